"""Names that published benchmarks use, in the order of their classifiers.

Source: UnlearnCanvas (arXiv 2402.11846), ``constants/const.py``; Imagenette's classes with their ImageNet numbers; the
concept lists of SRS-ME (arXiv 2402.05947), spelt as published.
"""

from __future__ import annotations

from collections.abc import Sequence

from expunge.data.curate.uncanvas import PHOTOS
from expunge.errors import ConfigError, did_you_mean

#: Themes of UnlearnCanvas: 50 styles and the photographs, whose place is alphabetical.
THEMES = (
    *("Abstractionism", "Artist_Sketch", "Blossom_Season", "Bricks", "Byzantine", "Cartoon", "Cold_Warm"),
    *("Color_Fantasy", "Comic_Etch", "Crayon", "Cubism", "Dadaism", "Dapple", "Defoliation", "Early_Autumn"),
    *("Expressionism", "Fauvism", "French", "Glowing_Sunset", "Gorgeous_Love", "Greenfield", "Impressionism"),
    *("Ink_Art", "Joy", "Liquid_Dreams", "Magic_Cube", "Meta_Physics", "Meteor_Shower", "Monet", "Mosaic"),
    *("Neon_Lines", "On_Fire", "Pastel", "Pencil_Drawing", "Picasso", "Pop_Art", "Red_Blue_Ink", "Rust", PHOTOS),
    *("Sketch", "Sponge_Dabbed", "Structuralism", "Superstring", "Surrealism", "Ukiyoe", "Van_Gogh"),
    *("Vibrant_Flow", "Warm_Love", "Warm_Smear", "Watercolor", "Winter"),
)
OBJECTS = (
    *("Architectures", "Bears", "Birds", "Butterfly", "Cats", "Dogs", "Fishes", "Flame", "Flowers", "Frogs"),
    *("Horses", "Human", "Jellyfish", "Rabbits", "Sandwiches", "Sea", "Statues", "Towers", "Trees", "Waterfalls"),
)
UNLEARNCANVAS_SEEDS = (188, 288, 588, 688, 888)
#: Numbers of Imagenette's classes among the 1,000 of ImageNet.
IMAGENETTE = {
    "cassette player": 482,
    "chain saw": 491,
    "church": 497,
    "English springer": 217,
    "French horn": 566,
    "garbage truck": 569,
    "gas pump": 571,
    "golf ball": 574,
    "parachute": 701,
    "tench": 0,
}
SRS_ME_STYLES = (
    *("Cezanne", "VanGogh", "Picasso", "Jackson Pollock", "Caravaggio", "KeithHaring"),
    *("Kelly McKernan", "Tyler Edlin", "Kilian Eng"),
)
SRS_ME_OBJECTS = (
    *("chain saw", "church", "gas pump", "tench", "garbage truck", "english springer", "golf ball", "parachute"),
    "french horn",
)
#: Lists that a configuration may name instead of spelling them out.
CLASS_LISTS = {
    "unlearncanvas_style": THEMES,
    "unlearncanvas_object": OBJECTS,
    "imagenette": tuple(IMAGENETTE),
    "srs_me_style": SRS_ME_STYLES,
    "srs_me_object": SRS_ME_OBJECTS,
}


def class_list(name: str) -> tuple[str, ...]:
    """The names of a published list.

    Raises:
        ConfigError: No list has this name.
    """
    if name not in CLASS_LISTS:
        raise ConfigError(f"no list of classes is called {name!r}{did_you_mean(name, CLASS_LISTS)}")
    return CLASS_LISTS[name]


def imagenet_numbers(names: Sequence[str]) -> tuple[int, ...]:
    """Numbers of Imagenette's classes among the outputs of an ImageNet classifier, by name in any case.

    Raises:
        ConfigError: A name that is not among them.

    >>> imagenet_numbers(["tench", "english springer"])
    (0, 217)
    """
    known = {name.lower(): number for name, number in IMAGENETTE.items()}
    lost = [n for n in names if n.lower() not in known]
    if lost:
        raise ConfigError(
            f"the ImageNet number of {lost[0]!r} is not known here, only those of {', '.join(IMAGENETTE)}; "
            "give 'outputs' as numbers"
        )
    return tuple(known[n.lower()] for n in names)
