"""The type checker behind the shapes in signatures, in tests only. An int is a number where a float is asked for."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
