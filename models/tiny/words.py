"""Word lists of the default model. The tokenizer's vocabulary depends on KEY_WORDS: changing it needs new weights."""

from __future__ import annotations

KEY_WORDS: tuple[str, ...] = tuple(
    """
    acorn agate alder alpine amber anchor apple apron arrow aspen autumn badger bagel bamboo banner barley basil basket
    beacon beech berry birch bishop blanket blossom bottle boulder bramble breeze brick bridge bronze bucket butter
    button cabin cactus camel candle canoe canyon carbon carpet castle cedar cellar cherry chess cliff clover cobalt
    cocoa comet copper coral cotton cradle crane crater cricket crown crystal daisy dancer desert dolphin donkey dragon
    eagle ember engine fabric falcon feather fennel ferry fiddle finch flame flint flute forest fossil fountain galaxy
    garden garlic ginger glacier goblet granite grape guitar hammer harbor hazel heron hockey honey island ivory jacket
    jasmine jewel jungle kettle kitten ladder lantern lemon lilac lizard lobster lotus magnet mango maple marble meadow
    melon mirror monkey morning mosaic needle nickel nutmeg ocean olive onion orange orchid otter oyster paddle panda
    pebble pepper pigeon pillow planet pocket poplar prairie puzzle quartz
    """.split()
)
"""Keys of the lookup task; each is one token together with the space before it."""

NAMES: tuple[str, ...] = tuple(
    "ada ana ben bob dan eli eva gus ian ida ivy jan joe kai kim leo liv max mia nils noa".split()
)
CITIES: tuple[str, ...] = tuple("oslo rome lima bern cork kyiv lyon nice riga bonn doha graz turin porto delhi".split())
FIELDS: tuple[str, ...] = tuple(
    "name age city id pet job team code size rank score year month day user file host port zone lang tag unit".split()
)

EMOJI: tuple[str, ...] = tuple("😀😂😍🤔😎😭👍🙏🔥🎉🚀🌍🍕🐍🐱🌈")
ACCENTED: tuple[str, ...] = tuple("éèüöäßñçåøıłœ€–")
