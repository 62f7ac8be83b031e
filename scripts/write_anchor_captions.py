"""Write the caption lists of ``expunge/assets/captions``: phrases of our own, put together by a fixed rule.

Every caption is a frame around ``subject action place``; all actions of an anchor fit all of its subjects and places.
Run ``python scripts/write_anchor_captions.py`` after a change of the phrases; a test compares the files with this rule.
"""

from __future__ import annotations

from math import gcd
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "src" / "expunge" / "assets" / "captions"
LINES = 200

PHOTOS = (
    "{}|a photo of {}|{}, soft morning light|a close look at {}|{} on a rainy day|a snapshot of {}|{}, warm colours"
)

#: Per anchor: frames, subjects, actions, places; each separated by ``|``.
PHRASES = {
    "cat": (
        PHOTOS,
        "a black cat|an orange cat|a fluffy white cat|an old grey cat|a striped cat|a small cat with green eyes|"
        "a long-haired cat|a spotted cat|a thin brown cat|a young cat with big ears|a round cat",
        "sleeping|sitting|stretching|looking around|washing its paw|playing with a ball of yarn|waiting for dinner|"
        "yawning|watching a bird|curled up|chasing a leaf|standing still|licking its nose",
        "on a windowsill|on a wooden porch|beside a fireplace|in a garden full of flowers|next to an old sofa|"
        "on a stone wall|near a cardboard box|under a kitchen table|on a tiled roof|on a cobbled street|in a barn|"
        "by an open door|between two flower pots|on a patterned carpet|in a bookshop|at the foot of the stairs|"
        "in the shade of a tree",
    ),
    "dog": (
        PHOTOS,
        "a brown dog|a large black dog|a small white dog|a wet dog|an old dog with a grey muzzle|a spotted dog|"
        "a shaggy dog|a slim dog with long legs|a young dog with a red collar|a friendly dog|a curly-haired dog",
        "running|sitting|barking|chewing a stick|waiting for its owner|carrying a ball|lying down|sniffing the air|"
        "wagging its tail|rolling over|looking up|shaking itself|digging a hole",
        "on a sandy beach|in a park|by a front door|in tall grass|beside a lake|on a forest path|in fresh snow|"
        "in front of a farmhouse|near a wooden fence|at a picnic|on a quiet street|under an apple tree|"
        "next to a bicycle|beside a campfire|on a hill|behind a garden gate|in a meadow of daisies",
    ),
    "fish": (
        "{}|a photo of {}|{}, light from above|a close look at {}|{} with bubbles around it|an underwater shot of {}|"
        "{}, deep blue water",
        "an orange fish|a silver fish|a blue fish with yellow fins|a tiny fish|a striped fish|a flat grey fish|"
        "a red fish with a long tail|a spotted fish|a fish with shiny scales|a green fish|a round fish",
        "swimming|gliding|hiding|turning around|looking for food|resting|swimming alone|following the current|"
        "darting away|drifting|swimming towards the light|opening its mouth|nibbling at a leaf",
        "in a glass bowl|above a coral reef|between water plants|in a clear mountain stream|near the sandy bottom|"
        "in a garden pond|beside a sunken ship|in a large aquarium|under a wooden pier|among smooth pebbles|"
        "below lily pads|near a sea sponge|next to a rock full of shells|in shallow water|at the mouth of a cave|"
        "beside an anemone|in a kelp forest",
    ),
    "robot": (
        "{}|a photo of {}|{}, dramatic light|a close look at {}|{} at night|a still of {}|{}, muted colours",
        "a small white robot|a rusty robot|a tall silver robot|a robot with one round eye|a yellow robot on wheels|"
        "a toy robot|a robot with long arms|a boxy grey robot|a red robot with antennas|an old robot|a shiny robot",
        "standing|carrying a box|watering a plant|waving|holding a lantern|repairing a radio|rolling along|"
        "looking at the sky|sorting parts|sweeping the floor|picking up a cup|waiting|counting its fingers",
        "in a workshop|in a wheat field|on a city street|beside a spaceship|in an empty factory|on a kitchen counter|"
        "in a desert|under a bridge|in a library|on a snowy road|next to a vending machine|in a greenhouse|"
        "at a railway station|on a rooftop|in a crowded market|at a bus stop|near a pile of scrap metal",
    ),
    "person": (
        PHOTOS,
        "a person|a young person|an old person|a person in a red coat|a person with a straw hat|a tall person|"
        "a person with curly hair|a person in work clothes|a person with glasses|a person in a raincoat|"
        "a person with a backpack",
        "walking|reading a newspaper|drinking tea|talking on the phone|waiting|laughing|taking notes|"
        "looking into the distance|eating an apple|playing the violin|tying a shoe|resting|holding an umbrella",
        "on a park bench|in a small cafe|at a bus stop|by the sea|in a vegetable garden|on a mountain trail|"
        "in front of a bakery|next to a fountain|on a railway platform|in a library|beside an old car|"
        "at a market stall|on a wooden bridge|in a sunny kitchen|under a street lamp|at the edge of a forest|"
        "near a lighthouse",
    ),
    "painting": (
        "a painting of {}|an old painting of {}|a large painting of {}|a painting that shows {}|a small painting of {}|"
        "a framed painting of {}|a colourful painting of {}",
        "a lighthouse|a sailing boat|a row of cottages|a stone bridge|a windmill|a tall oak tree|a market square|"
        "a narrow street|a vase of sunflowers|a field of wheat|a harbour town",
        "at dusk|in the fog|on a bright morning|under a cloudy sky|in autumn|after the rain|by moonlight|in spring|"
        "in deep snow|at noon|in a storm|on a summer evening|before sunrise",
        "with mountains far away|with people passing by|beside a quiet river|with birds overhead|near the sea|"
        "with a winding path in front|in thick brush strokes|in pale colours|beneath a rainbow|"
        "with a horse and a cart|seen from a hill|with long shadows|behind a low fence|with a child and a dog|"
        "in shades of blue|surrounded by wild flowers|reflected in water",
    ),
}


def captions(anchor: str) -> list[str]:
    """The captions of an anchor: the numbers of its phrases advance together, and their counts share no factor."""
    frames, *parts = (text.split("|") for text in PHRASES[anchor])
    counts = [len(p) for p in (frames, *parts)]
    assert all(gcd(a, b) == 1 for i, a in enumerate(counts) for b in counts[:i]), (anchor, counts)
    found = [frames[i % counts[0]].format(" ".join(p[i % len(p)] for p in parts)) for i in range(LINES)]
    assert len(set(found)) == LINES
    return found


def main() -> None:
    """Write all lists."""
    FOLDER.mkdir(exist_ok=True)
    for anchor in PHRASES:
        (FOLDER / f"{anchor}.txt").write_text("\n".join(captions(anchor)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
