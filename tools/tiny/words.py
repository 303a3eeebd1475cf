"""Words, names and facts that the tasks are made of. Seeded and split here, nowhere else."""

import hashlib
import random

COMMON = """
able acid aged also apple april arch area army away baby back bake ball band bank barn base bath
beam bean bear beat bell belt bench bird bite black blade blame blank blue board boat body bold
bolt bone book boot born bowl brain brand brave bread brick bridge brief bring broad brown brush
build bulb burn cabin cable cake calm camel camp candle card care cargo cart case castle cat
cave chain chair chalk charm chart chase cheap cheese chess chest chief child city civil claim
class clay clean clear clerk clock cloth cloud coal coast coat code coffee coin cold comet cook
cool copper coral corn cotton count court cover craft crane cream creek crisp cross crowd crown
cube curve cycle daemon daily dance dawn deep deer delta dense depth desert desk diary dice dish
diver dock doctor dog door dove dragon draw dream dress drift drink drive drum duck dust eagle
early earth east echo edge eight elbow elder empty engine enjoy equal event exact fable face
fair faith farm fast feast fence ferry fiber field fifth fig final fish five flag flame flash
fleet flock floor flour flower fluid flute focus force forest fork form found four fox frame
fresh frog front frost fruit fuel garden gate ghost giant glass globe glove goat gold grace
grain grand grape graph grass great green grid group guard guest guide habit hair half hand
happy harbor hard harp hat hawk heart heavy hedge hill hint hobby holly honey hook horse hotel
house human humor ice idea inch index iron island ivory jacket jam jewel join joke judge juice
jump kettle key kind king kite knee knife knot ladder lake lamp land large laser latch laugh
leaf learn lemon level light lily limit linen lion list lobby local lock logic long loop lucky
lunar lunch magic maple march market mask master match meal medal melon metal meter milk mill
mind mint mirror model money moon moral morning mother motor mount mouse mouth movie music nail
name narrow navy neck needle nest night noble north nose novel number nurse oak oasis ocean
olive onion open opera orange orbit order organ otter oven owl oxygen paint palm panda paper
park party pasta patch path peace pear pearl pencil penny piano pilot pine pipe pixel place
plain plane planet plant plate plum poem point polar pond pony poppy porch post potato pound
power press price pride prime print prize proof proud pump pupil purple puzzle queen quest quick
quiet quilt rabbit race radar radio rain ranch range rapid raven razor ready record reed reef
rice ridge ring river road robin robot rock roof room root rope rose round royal ruby ruler
rural saddle safe sail salad salt sand scale scarf scene school score scout sea seal season seed
seven shade shape shark sharp sheep shell shirt shoe shore short silk silver simple sister skate
skill sky slate sleep slide slope smile smoke snail snow soap soccer soft solar solid song sound
soup south space spark spice spider spoon spring square stable staff stage stair star start
steam steel stem stone storm story stove street string strong sugar summer sun surf swan sweet
swift sword table tail tale tape taste teach team tent theme thin third thread three thumb tiger
timber time toast today token tooth torch total tower town toy trace track trade trail train
tree trend tribe trick trip truck trunk trust truth tulip tunnel turtle twin uncle union unit
upper urban valley value velvet verb video view violet violin virus visit vivid voice vote wagon
wall walnut warm watch water wave wheat wheel whale white wide wind window wine wing winter wire
wise wolf wonder wood wool word world wrist yard year yellow young zebra zero zone
""".split()  # noqa: SIM905
NAMES = """
Ada Alan Anna Ben Bella Carl Clara Dan Dora Emil Emma Eva Finn Frida Greta Gus Hana Hugo Ida
Ivan Iris Jack Jane Karl Kira Lars Lena Leo Lina Mara Max Mia Nina Nils Olga Otto Paul Petra
Rosa Ruth Sam Sara Tim Tina Uma Vera Victor Wanda Yara Zoe
""".split()  # noqa: SIM905
CITIES = """
Athens Berlin Bern Boston Cairo Delhi Dublin Geneva Hanoi Kyoto Lagos Lima Lisbon London Madrid
Milan Moscow Nairobi Oslo Paris Prague Quito Riga Rome Seoul Sofia Sydney Tokyo Turin Vienna
Warsaw Zurich
""".split()  # noqa: SIM905
JOBS = """
baker carpenter dentist doctor driver farmer nurse painter pilot teacher tailor writer
""".split()  # noqa: SIM905
COLOURS = """
red blue green black white yellow purple orange brown grey pink silver
""".split()  # noqa: SIM905
ANIMALS = """
cat dog horse rabbit goat parrot turtle snake hamster duck cow pig sheep owl frog mouse donkey
goose
""".split()  # noqa: SIM905
FOODS = """
apples bread cheese rice soup pasta honey beans plums fish olives pears nuts cake eggs potatoes
tomatoes figs
""".split()  # noqa: SIM905

ONSETS = """
b c d f g h j k l m n p r s t v w z br cl dr fl gr pl sk st tr sh ch
""".split()  # noqa: SIM905
VOWELS = """
a e i o u ai ea oo ou
""".split()  # noqa: SIM905
CODAS = ["", "", "", "n", "r", "l", "t", "s", "m", "k", "nd", "st", "mp"]

HELD_OUT_SHARE = 8
"""One in so many words and operand pairs is never trained on."""


def is_held_out(*parts: object) -> bool:
    """Whether this word, pair or combination belongs to the evaluation: by hash, so no overlap."""
    text = "/".join(str(part) for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % HELD_OUT_SHARE == 0


def invented(rng: random.Random) -> str:
    """A pronounceable word that means nothing: 'trealk', 'moud', 'zinora'."""
    syllables = rng.choice((1, 2, 2, 3))
    return "".join(
        rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables)
    )[:9]


def word(rng: random.Random, held_out: bool) -> str:
    """A word of the wanted half: real ones and invented ones, three to nine letters."""
    while True:
        found = rng.choice(COMMON) if rng.random() < 0.5 else invented(rng)
        if len(found) >= 3 and is_held_out("word", found) == held_out:
            return found
