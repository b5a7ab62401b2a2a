"""The words of the synthetic shop: what people may want, what is sold, and how both are spoken of.

A motive has words for titles and descriptions, which the shop uses, and words for praise and wishes, which customers
use. The two share few words, as in life: "Fragrance-Free" on the label is "no perfume" in a review.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Motive:
    """Something that a customer is after.

    `kinds` are the kinds of products that it may be found in, `titles` its words on a label, `facts` sentences of a
    description, `praise` what a customer says who found it, `wishes` what one says who did not (after "I wanted").
    """

    name: str
    kinds: tuple[str, ...]
    titles: tuple[str, ...]
    facts: tuple[str, ...]
    praise: tuple[str, ...]
    wishes: tuple[str, ...]


MOTIVES = (
    Motive(
        name="fragrance-free",
        kinds=("care",),
        titles=("Fragrance-Free", "Unscented", "Hypoallergenic", "Sensitive Skin"),
        facts=("Made without perfume.", "Tested on reactive skin."),
        praise=(
            "No perfume, my skin stays calm",
            "It smells of nothing and my rash is gone",
            "At last something that does not make me itch",
            "Gentle enough for my allergies",
        ),
        wishes=("something without scent", "something my allergies can stand"),
    ),
    Motive(
        name="travel",
        kinds=("care", "gear"),
        titles=("Travel-Size", "Carry-On", "Foldable", "Pocket-Size"),
        facts=("Fits into hand luggage.", "Packs flat and weighs next to nothing."),
        praise=(
            "Went through airport security without trouble",
            "Takes no room in my suitcase",
            "I fly every week and this is always in my bag",
            "Small enough for a weekend trip",
        ),
        wishes=("something small for my flights", "something that fits my suitcase"),
    ),
    Motive(
        name="refillable",
        kinds=("care", "gear", "food"),
        titles=("Refillable", "Plastic-Free", "Zero-Waste", "Compostable"),
        facts=("Refills are sold apart, so nothing is thrown away.", "Comes without a gram of plastic."),
        praise=(
            "One more thing that stays out of the bin",
            "I top it up instead of buying a new one",
            "No packaging left over, good for the planet",
            "We are cutting down on rubbish and this helps",
        ),
        wishes=("less packaging to throw away", "something I can fill up again"),
    ),
    Motive(
        name="for children",
        kinds=("care", "gear"),
        titles=("Kids'", "Children's", "Toddler", "Little Ones"),
        facts=("Sized for small hands.", "Loved by ages three to eight."),
        praise=(
            "My daughter will not let go of it",
            "Birthday present for my nephew, he was thrilled",
            "The boys at nursery all want one now",
            "Our five-year-old uses it alone",
        ),
        wishes=("a present for my nephew", "something my daughter can use"),
    ),
    Motive(
        name="vegan",
        kinds=("care", "food"),
        titles=("Vegan", "Plant-Based", "Cruelty-Free", "Animal-Free"),
        facts=("No ingredient comes from animals.", "Never tested on animals."),
        praise=(
            "No milk, no honey, no beeswax in it",
            "Kind to animals, which matters to me",
            "Not tested on rabbits, so I buy it again",
            "I read the label twice: nothing from a cow",
        ),
        wishes=("something that no animal paid for", "something without milk or beeswax"),
    ),
    Motive(
        name="large family",
        kinds=("care", "food"),
        titles=("Family Pack", "Value Pack of 12", "Bulk", "Jumbo"),
        facts=("Lasts a household for months.", "More for less in one big box."),
        praise=(
            "Six of us at home and it still lasts",
            "Cheaper by the dozen, the cupboard is full",
            "Enough for the whole crowd",
            "I no longer run to the shop every week",
        ),
        wishes=("enough for the six of us", "a bigger box, we run out fast"),
    ),
    Motive(
        name="fine gift",
        kinds=("care", "gear", "food"),
        titles=("Gift-Boxed", "Luxury", "Deluxe Presentation", "Keepsake"),
        facts=("Comes in a ribboned case.", "Finished in gold and velvet."),
        praise=(
            "The wrapping alone made my wife smile",
            "For our anniversary, it looked very elegant",
            "A host present that impresses",
            "Looks twice as expensive as it was",
        ),
        wishes=("something elegant for our anniversary", "nicer wrapping, it was for my wife"),
    ),
    Motive(
        name="easy to handle",
        kinds=("care", "gear"),
        titles=("Easy-Grip", "Easy-Open", "Large-Print", "Arthritis-Friendly"),
        facts=("Opens with two fingers.", "Designed with rheumatologists."),
        praise=(
            "I can open it in spite of my stiff fingers",
            "My grandmother manages without help",
            "No twisting, my wrists thank you",
            "I can even read the label without glasses",
        ),
        wishes=("something my stiff fingers can open", "something my grandmother can hold"),
    ),
    Motive(
        name="outdoors",
        kinds=("care", "gear", "food"),
        titles=("Camping", "Trail", "Weatherproof", "Expedition"),
        facts=("Built for rain, mud and dust.", "Tested for weeks in the mountains."),
        praise=(
            "Survived a week of rain in our tent",
            "Comes along on every hike",
            "Dropped it on rocks by the lake, no harm done",
            "Just right around the fire in the woods",
        ),
        wishes=("something that survives a hike", "something for nights in the tent"),
    ),
    Motive(
        name="better sleep",
        kinds=("care", "gear", "food"),
        titles=("Bedtime", "Night-Time", "Sleep-Well", "Slumber"),
        facts=("Calms body and mind after dark.", "Part of a quiet evening."),
        praise=(
            "I doze off within minutes",
            "No more staring at the ceiling at three",
            "My evenings are calm and I wake up rested",
            "Helped my insomnia more than pills",
        ),
        wishes=("something that helps me doze off", "something against my insomnia"),
    ),
    Motive(
        name="pets",
        kinds=("care", "gear"),
        titles=("Pet-Safe", "Paw-Proof", "Dog Owner's", "Cat-Friendly"),
        facts=("Harmless when licked or chewed.", "Shrugs off fur and claws."),
        praise=(
            "Our puppy chewed on it and both are fine",
            "Even with two cats the sofa is clean",
            "Safe to have around when the dog licks everything",
            "No more fur all over the place",
        ),
        wishes=("something that stands up to our puppy", "something safe around two cats"),
    ),
    Motive(
        name="training",
        kinds=("care", "gear", "food"),
        titles=("Gym", "Workout", "Post-Run", "Athlete's"),
        facts=("For before, during and after exercise.", "Stands sweat and daily use."),
        praise=(
            "I use it after every marathon session",
            "My coach recommended it and my times got better",
            "Perfect between two sets of squats",
            "Lives in my locker next to the trainers",
        ),
        wishes=("something for after my runs", "something for the locker room"),
    ),
)

PRODUCTS: dict[str, tuple[tuple[str, str], ...]] = {
    "care": (
        ("Body Care", "Hand Cream"),
        ("Body Care", "Shampoo"),
        ("Body Care", "Body Wash"),
        ("Body Care", "Lip Balm"),
        ("Body Care", "Sunscreen"),
        ("Body Care", "Toothpaste"),
        ("Household", "Laundry Liquid"),
        ("Household", "Dish Soap"),
        ("Household", "Surface Cleaner"),
    ),
    "gear": (
        ("Kitchen", "Water Bottle"),
        ("Kitchen", "Lunch Box"),
        ("Kitchen", "Mug"),
        ("Home", "Blanket"),
        ("Home", "Towel"),
        ("Home", "Lamp"),
        ("Leisure", "Backpack"),
        ("Leisure", "Notebook"),
        ("Leisure", "Card Game"),
    ),
    "food": (
        ("Pantry", "Herbal Tea"),
        ("Pantry", "Snack Bars"),
        ("Pantry", "Cocoa"),
        ("Pantry", "Soup Mix"),
        ("Pantry", "Trail Mix"),
        ("Pantry", "Oat Biscuits"),
    ),
}
"""Kind → (category, product)."""

FLAVOURS = {
    "care": ("Aloe", "Oat", "Green Clay", "Sea Salt", "Almond", "Cotton", "Rice Milk", "Cucumber"),
    "gear": ("Blue", "Forest Green", "Coral", "Slate Grey", "Sand", "Plum", "Mustard", "White"),
    "food": ("Apple", "Hazelnut", "Ginger", "Cherry", "Vanilla", "Carrot", "Mint", "Pear"),
}
"""Kind → colours and flavours: they tell items apart and mean nothing to anyone."""

BRANDS = (
    "Fernleaf",
    "Harrow & Pine",
    "Bluebird",
    "Millstone",
    "Otterbrook",
    "Calder",
    "Juniper Lane",
    "Northwick",
    "Saltmarsh",
    "Tillage",
    "Kestrel",
    "Wren & Co",
)

REMARKS = (
    "The {product} arrived on time.",
    "Second {product} I have from {brand}.",
    "The colour is as shown.",
    "A friend asked where I got it.",
    "Fair price.",
    "Would buy again.",
    "Came in a dented box.",
    "",
    "",
    "",
)
"""What reviews say besides; it tells nothing about motives."""
