"""What a sound file is called, as labels: a vocabulary that reads file names, and the broader labels that follow.

A file name is first made words, "FootStepGrass1.ogg" -> "foot step grass". A label holds where one of its words or
phrases stands among them whole, or where one of its parts (regular expressions) is found anywhere. Drum kits are named
in another way than everything else, so there are two vocabularies.
"""

import re
from pathlib import PurePosixPath
from typing import NamedTuple

from audiomodels.data import file_words


class Names(NamedTuple):
    """What tells one label: words and phrases, comma-separated; and parts of words."""

    label: str
    words: str
    parts: str = ""

    def pattern(self) -> re.Pattern[str]:
        """Finds the label in the words of a file name."""
        words, parts = ("|".join(filter(None, text.split(", "))) for text in (self.words, self.parts))
        return re.compile("|".join(filter(None, (rf"\b(?:{words})\b" if words else "", parts))))


DRUMS = (
    Names("Bass_drum", "kick, bd, bassdrum, bass drum, bass hard, bass soft, k", r"kick\b"),
    Names("Snare_drum", "sn, sd", "snare"),
    Names("Hi-hat", "hi hat, hh, chh, ohh, hhat, ho, cymbal closed, cymbal pedal", r"hihat, \bhat, ^hh, openhat"),
    Names("Crash_cymbal", "china, cc, cymbal hard, cymbal open, cymbal soft", "crash, splash"),
    Names("Ride_cymbal", "rd, rc, bell hard, bell hardest, bell soft, bell softest, bell med", "ride"),
    Names("Tom-tom", "tm, ft, t", r"\btom, floortom"),
    Names("Rimshot", "side ?stick, rim, rs, stick", "rimshot, sidestick, rim ?click"),
    Names("Clapping", "", "clap"),
    Names("Cowbell", "cb", r"cowbell, agogo, \b(?:dununba|kenkeni|sangban) bell\b"),
    Names("Tambourine", "", "tambourine"),
    Names(
        "Hand_drum", "", r"bongo, conga, cajon, \bdjembe, \btabla, \budu, \bdarbuka, \b(?:dununba|kenkeni|sangban) head"
    ),
    Names("Shaker", "", r"maraca, shaker, \bshake, \bcabasa, \bcaxixi"),
    Names("Wood_block", "", r"clave, woodblock, \bwood block"),
    Names("Finger_snapping", "snap", "finger ?snap"),
    Names("Glass", "", "glass"),
)

EFFECTS = (
    # birds
    Names("Crow", "crow"),
    Names("Duck_goose", "duck, gander, goose, rubberduck"),
    Names("Fowl", "rooster, hen, turkey, quail, pheasant, grouse, guinea fowl"),
    Names("Owl", "owl"),
    Names(
        "Other_bird",
        "birds?, albatross, booby, crane, emu, flamingo, heron, iora, pelican, quetzal, sparrow, stork, vulture, "
        "firebird, seagull, blackbird, lark, cuckoo, tucan, nandou, penguin, hawk, zozulka, green",
    ),
    # other animals
    Names("Canidae", "dog, dogmatix, wolf, fox, hyena", "bark"),
    Names("Cat", "cat, meow, lynx, blackcat, pishik"),
    Names("Roar", "lion, tiger, jaguar, bear, roar, growl, snarl, drake, dragon, troll, yeti, gorilla, giant panda"),
    Names("Cattle", "cow, calf, bull, yak, bison, moose"),
    Names("Sheep_goat_deer", "sheep, lamb, ram, goat, baa, mountaingoat, deer, doe, caribou, giraffe"),
    Names("Horse", "horse, foal, donkey, zebra, canter"),
    Names("Pig", "pig, hippopotamus, tusker"),
    Names("Elephant", "elephant, rhinoceros, mammut"),
    Names("Monkey", "monkey, chimp, chimpanzee, koala"),
    Names(
        "Small_mammal",
        "mouse, hamster, squirrel, chinchilla, jerboa, ferret, rabbit, beaver, badger, hedgehog, porcupine, otter, "
        "raccoon, bat, wombat, guinea pig, chitter",
    ),
    Names("Insect", "bee, mosquito, hornet, grasshopper, cricket, beetle, weevil, moth, ladybug"),
    Names("Frog", "frog, newt"),
    Names("Hiss", "hiss, snake, python, iguana, steam"),
    Names("Marine_mammal", "whale, dolphin, orca, sea lion"),
    # weather, water, fire
    Names("Thunder", "thunder, lightningbolt, lightning"),
    Names("Rain", "rain, storm"),
    Names("Wind", "wind, arcticwind, desert ambient"),
    Names(
        "Fire",
        "fire, flame, campfire, burn, burning, furnace, smallfire, firesoft, torch, flamer, flamethrower, lava, "
        "embers, blowtorch, sizzle, smoke",
    ),
    Names("Water", "water, splash, waterfall, waterfontain, swimming, drown, droplet, drip, lake, toilet, blub"),
    Names("Bubbles_pop", "bubble, bubbles, pop"),
    # weapons
    Names(
        "Explosion",
        "explosion, explosions, explode, nuke, dynamite, exp, bombardment, cineboom, boom, grenade, firecracker, "
        "fireworks, cave in, rumble",
    ),
    Names(
        "Gunshot",
        "gun, gunshot, shot, shotgun, shotgunfire, minigun, gunfire, ricoche, bullet, rifle, pistol, sniper, "
        "machinegun, thunderstick, blaster, repeater, mortar, smg, chaingun",
    ),
    Names("Laser", "laser, zap, plasma, zapper, beam, ion, disruptor, particle, proton, pulse"),
    Names(
        "Rocket",
        "rocket, missile, torpedo, takeoff, hyperdrive, atomic, jetpack, afterburner, javelin, sidewinder",
    ),
    Names("Bow_arrow", "bow, crossbow, arrow, arrows"),
    # things that are struck, moved, broken
    Names("Footsteps", "foot step, steps, step, walk, walking", "footstep"),
    Names("Digging", "dig, dug, gravel, dirt track, place node"),
    Names("Glass", "glass, shatter, crystallo, bottle, jar, vase, icecrash, ice dig, ice dug", "breakglass"),
    Names("Door", "door, gate, creak, chest"),
    Names("Bell", "bell, savebell, clock, tower ?clock, gong"),
    Names(
        "Metal_clang",
        "sword, axe, spear, dagger, hatchet, knife, clank, metal, blade, pincers, anvil, blacksmith, hammer, mallet",
    ),
    Names("Whoosh", "swish, whoosh, miss, throw, swing, sling, throwing, woosh, swoosh"),
    Names(
        "Thud",
        "thud, fall, land, bump, stomp, fist, punch, club, flail, kick, hit, impact, collision, bounce, crash, mace, "
        "staff, wood, hard",
        "breakwood, breakmetal",
    ),
    Names("Saw_ratchet", "saw, zipper, ratchet, scissors, zipline"),
    Names("Coin", "coin, coins, gold, cash"),
    # machines
    Names(
        "Engine",
        "engine, diesel, tractor, motor, excavator, vacuum cleaner, washing machine, machine, machinery, pump, "
        "minepump, generator, ventilation, turbine, industry, coal mine, ore mine, power, mill, airhammer, jet",
    ),
    Names("Train", "train, rail, cart"),
    Names("Helicopter", "helicopter, quadrocopter"),
    Names("Aircraft", "airplane, plane, aircraft"),
    Names("Skid", "skid, screech, brake"),
    Names("Alarm", "alarm, siren, alert, firetruck, fire station, basealert, warning, health"),
    Names("Telephone", "phone, telephone, walkie talkie, incoming call, outgoing"),
    Names(
        "Click",
        "click, clic, button, switch, tick, toggle, typewriter, key ?click, shutter, ticking, watch, countdown, camera",
    ),
    # people
    Names("Whistle", "whistle"),
    Names("Laughter", "laugh, giggle"),
    Names(
        "Groan_shout",
        r"human, dwarf, elf, orc, goblin, ogre, zombie, ghoul, groan, wail, scream, ugg, civ\w*, male\w*, female\w*, "
        "hurt, pain, grunt, grunts, wscream, die, death, oof, ooff, ow, ugh",
    ),
    Names("Bite", "burp, eat, gulp, bite"),
    Names("Crowd", "cheer, applause, crowd, croud, market, circus, football, hockey, chat, school"),
    # instruments
    Names("Brass", "horn, fanfare, trumpet, trombone, brass, final roll call"),
    Names("Accordion", "accordion, squeezebox, hand organ, bagpipes, aeoline, harmonica"),
    Names("Organ", "organ"),
    Names("Piano", "piano"),
    Names(
        "Plucked_string",
        "guitar, guit, ukulele, lute, zither, yueqin, harp, topshuur, balalaika, youhikko, yangqin, hang",
    ),
    Names("Bowed_string", "violin, cello, erhu, gamba, rabel"),
    Names(
        "Woodwind",
        "flute, recorder, quena, pipe, ney, ode, washint, dulzaina, zhaleyka, rozhok, xun, whirligig, kazoo, oboe, "
        "clarinet, bassoon, saxophone, zurna",
    ),
    Names("Mallet_percussion", "xylophone, chime, glockenspiel, marimba"),
    Names("Drum_kit", "drums?, timpani, changu, drumkit, wardrums, ipu, cuica, tomtom"),
    Names("Crash_cymbal", "cymbals?"),
    Names("Shaker", "maracas, spoons"),
)

DOMAINS = {
    domain: [(names.label, names.pattern()) for names in rules]
    for domain, rules in {"drum": DRUMS, "fx": EFFECTS}.items()
}

# Where one of the first holds, the second do not: "wolf-hit" is a voice, not a thud.
INSTEAD = (
    ("Groan_shout Roar Canidae Horse Small_mammal Hiss Pig", "Thud"),
    ("Roar Canidae Horse Hiss Pig", "Groan_shout"),
    ("Footsteps", "Digging Thud"),
    ("Bow_arrow", "Fire"),
    ("Marine_mammal", "Roar"),
    ("Fowl Crash_cymbal", "Thud"),
    ("Alarm", "Fire"),
    ("Accordion", "Organ"),
    ("Laughter", "Groan_shout"),
    ("Door", "Glass"),
)

BROADER = {  # what holds whenever one of these does
    "Bird": "Crow Duck_goose Fowl Owl Other_bird",
    "Animal": "Bird Canidae Cat Roar Cattle Sheep_goat_deer Horse Pig Elephant Monkey Small_mammal Insect Frog Hiss "
    "Marine_mammal",
    "Percussion": "Bass_drum Snare_drum Hi-hat Crash_cymbal Ride_cymbal Tom-tom Rimshot Cowbell Tambourine Hand_drum "
    "Shaker Wood_block Drum_kit Mallet_percussion",
    "Musical_instrument": "Percussion Piano Organ Accordion Plucked_string Electric_guitar Bass_guitar Bowed_string "
    "Choir Brass Woodwind Synthesizer",
    "Human_sound": "Clapping Finger_snapping Laughter Groan_shout Crowd Speech",
    "Vehicle_or_machine": "Engine Train Helicopter Aircraft Rocket",
    "Natural_sound": "Thunder Rain Wind Fire Water",
}

FAMILIES = (  # General MIDI programs, first and last, of an instrument's label; sound effects are in none
    (0, 5, "Piano"),
    (8, 15, "Mallet_percussion"),
    (16, 20, "Organ"),
    (21, 23, "Accordion"),
    (24, 25, "Plucked_string"),
    (26, 31, "Electric_guitar"),
    (32, 39, "Bass_guitar"),
    (40, 44, "Bowed_string"),
    (45, 46, "Plucked_string"),
    (48, 51, "Bowed_string"),
    (52, 54, "Choir"),
    (56, 63, "Brass"),
    (64, 71, "Woodwind"),
    (72, 79, "Woodwind"),
    (80, 87, "Synthesizer"),
    (104, 107, "Plucked_string"),
)


def labels_of(path: str, domain: str) -> list[str]:
    """The labels that a file's name tells, sorted; domain: "drum" or "fx"."""
    words = file_words(PurePosixPath(path).stem)
    if domain == "fx" and "footsteps/" in path:
        words += " footsteps"
    labels = {label for label, pattern in DOMAINS[domain] if pattern.search(words)}
    for present, dropped in INSTEAD if domain == "fx" else ():
        if not labels.isdisjoint(present.split()):
            labels.difference_update(dropped.split())
    return sorted(labels)


def broader(label: str) -> set[str]:
    """The labels that hold whenever this one does, without itself."""
    found: set[str] = set()
    for parent, children in BROADER.items():
        if label in children.split():
            found |= {parent} | broader(parent)
    return found
