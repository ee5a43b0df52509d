"""Draw the example pictures of this folder again: ``python examples/draw.py``.

The bundled model, with all its vision tokens, answers the questions beside each picture as written.
"""

from pathlib import Path

from visiontrim.zoo import HELD_OUT, draw_scene

SCENES = {
    # what is the orange digit? 5 | what color is the C? orange | where is the square? top right
    # what shape is blue? star | is there a cyan triangle? yes | how many triangle objects? 3
    # is the purple triangle left of the blue star? yes
    "shapes": HELD_OUT + 273,
    # what is the green digit? 3 | what is the letter? H | what color is the 8? cyan | what shape is red? diamond
    # how many diamond objects? 3 | where is the orange digit? bottom right | is the letter above the red diamond? yes
    "digits": HELD_OUT + 264,
    # what color is the triangle? blue | what is the digit? 4 | how many pink objects? 2 | is there a cyan star? yes
    # is there a green triangle? no | where is the cyan star? top right
    "stars": HELD_OUT + 220,
    # what is the green digit? 7 | what color is the C? pink | where is the blue star? bottom right
    # is there a yellow circle? yes | is there a 9? no | is the red star above the blue star? yes
    "mixed": HELD_OUT + 217,
}

if __name__ == "__main__":
    for name, seed in SCENES.items():
        draw_scene(seed).image.save(Path(__file__).parent / f"{name}.png")
