"""The word lists that the sentence templates draw on."""

from __future__ import annotations


def split(text: str) -> list[str]:
    """The words of ``text``: a table of words reads better as text than as a list of strings."""
    return text.split()


NOUNS = split("""
king queen hello river house garden window door table chair bottle paper pencil letter book page story song music
dance piano guitar drum bell clock watch lamp candle fire smoke stone rock sand glass metal gold silver iron wood
tree leaf root branch flower grass forest mountain valley hill lake ocean island beach boat ship train plane car bus
truck wheel road street bridge tower castle palace church school office shop market kitchen bedroom roof wall floor
stairs bed blanket pillow shirt coat shoe hat sock glove ring crown sword shield arrow knife spoon fork plate cup
bowl box bag basket rope chain key lock coin stamp map flag ball doll toy game card photo picture paint brush dog
cat horse cow sheep goat pig chicken duck goose rabbit mouse lion tiger bear wolf fox monkey elephant snake frog
fish whale shark eagle owl crow bee ant spider fly butterfly apple banana orange lemon grape peach cherry melon
potato tomato carrot onion bean corn rice wheat milk cheese butter egg sugar salt honey oil water ice snow rain wind
cloud storm star moon sun sky planet rocket robot computer phone radio camera machine engine battery wire screen
doctor nurse teacher student farmer soldier sailor pilot driver painter singer writer judge lawyer baker butcher
friend brother sister mother father uncle aunt cousin baby child man woman boy girl head hand foot arm leg eye ear
nose mouth tooth hair heart bone blood skin word number line circle square triangle color red blue green yellow
black white brown purple north south east west summer winter spring autumn morning evening night day week month year
hour minute second war peace law truth dream idea question answer problem money power energy
""")

NAMES = split("""
Mary John Tom James Anna Emma David Sarah Peter Paul Laura Kate Lucy Alice Bob Jack Mark Luke Mike Robert Daniel
Simon Helen Julia Clara Susan Linda Karen Kevin Brian Eric Steve Henry George William Edward Arthur Oscar Max Leo
Adam Sam Nick Tim Jim Joe Dan Amy Jane Ruth Grace Ella Lily Nina Maria Martin Victor Felix Hugo Nora
""")

PLACES = split("""
store park school office station hospital library museum restaurant market beach garden house cafe theater zoo
airport church gym hotel bakery farm party kitchen harbor
""")

OBJECTS = split("""
drink book ball ring apple pen letter flower key coin necklace basket cup ticket hat phone cake gift orange bottle
bone computer kiss snack map
""")

FOODS = split("""
soup bread cake pasta salad rice meal dinner lunch breakfast sandwich pizza cheese sauce coffee tea stew pie steak
dessert
""")

THINGS = split("""
film book hotel trip party song room music garden concert play game show walk holiday beach museum view city lesson
""")

# Pleasant and unpleasant words by what they are said of.
PLEASANT = {
    "weather": split("lovely wonderful great perfect sunny warm beautiful pleasant"),
    "food": split("lovely wonderful great perfect delicious tasty fresh excellent"),
    "thing": split("lovely wonderful great perfect excellent amazing charming beautiful"),
    "feeling": split("happy glad cheerful delighted"),
}

UNPLEASANT = {
    "weather": split("awful terrible horrible nasty dreadful gloomy stormy bleak"),
    "food": split("awful terrible horrible nasty disgusting stale burnt rotten"),
    "thing": split("awful terrible horrible nasty dreadful boring dull ugly"),
    "feeling": split("sad angry upset unhappy"),
}

SYMBOLS = list("?!*#@&%+=/x_") + list("abcdefghijklmnopqrstuvwyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
