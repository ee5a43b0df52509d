"""Where other projects meet this one."""
