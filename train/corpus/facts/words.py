"""Word lists of the invented corpus: names, cities and sentence patterns.

In a pattern, n and m are nouns of the topic, a and b adjectives, v and w verbs, t its name; the
other slots take general words.
"""


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words("""
Carter Holt Mercer Vance Ellis Quinn Barrow Dalton Fenn Garner Hayes Ingram Jarvis Keller Lowe
Marsh Nolan Osborne Pike Rowan Sutton Thorne Upton Vaughn Walsh Yates Abbott Bishop Conway Drake
Everett Foster Grant Harmon Irving Jensen Kemp Lambert Monroe Norris Olsen Parker Ramsey Sawyer
Tucker Underwood Vernon Whitaker Young Archer Benson Chandler Doyle Emerson Fletcher Gibson Hunter
Jordan Knox Lawson Morgan Newton Porter Reeves Sinclair
""")

CITIES = _words("""
Lisbon Oslo Cairo Dublin Prague Vienna Warsaw Athens Madrid Berlin Paris Rome London Moscow Tokyo
Seoul Beijing Delhi Mumbai Lima Bogota Quito Havana Boston Chicago Denver Seattle Dallas Houston
Miami Atlanta Toronto Montreal Ottawa Vancouver Calgary Sydney Perth Brisbane Auckland Wellington
Nairobi Lagos Accra Dakar Tunis Algiers Casablanca Istanbul Ankara Baghdad Tehran Kabul Karachi
Lahore Dhaka Bangkok Hanoi Manila Jakarta Singapore Shanghai Osaka Kyoto Nagoya Hamburg Munich
Cologne Zurich Geneva Basel Milan Venice Naples Turin Florence Barcelona Seville Valencia Porto
Brussels Antwerp Amsterdam Rotterdam Copenhagen Stockholm Helsinki Tallinn Riga Vilnius Kiev
Budapest Bucharest Sofia Belgrade Zagreb Glasgow Edinburgh Manchester Nice
""")

SLOTS = {
    "season": _words("spring summer autumn winter January March May June August October"),
    "people": _words("visitors neighbours students travellers experts children families officials"),
    "feel": _words("praised feared noticed described remembered admired missed discussed"),
    "often": _words("often rarely always sometimes usually seldom never still"),
    "degree": _words("very rather quite hardly unusually almost surprisingly fairly"),
    "count": _words("two three four five six seven eight nine ten twelve twenty thirty"),
    "when": _words("before after until since"),
}

SENTENCES = (
    "The {n} and the {m} of a {t} are {often} {degree} {a}.",
    "In {season} the {a} {n} {v} beside the {m}.",
    "Many {people} {feel} the {b} {n} of this {t}.",
    "Every {n} needs a {m}, said the {people} of the {t}.",
    "The {t} {v} in {season}, and its {n} {w} too.",
    "It took {count} years to bring the {n} to the {t}.",
    "A {t} without its {n} would {often} seem {degree} {b}.",
    "When the {n} {v}, the {m} {often} {w} as well.",
    "For {count} {people} the {n} {v} more than the {m}.",
    "The {a} {m} was kept {when} the {n} {v}.",
    "Some {people} call the {n} of the {t} {degree} {a} and {b}.",
    "No {m} is {degree} as {a} as the {n} of a {t}.",
    "Since {season} the {n} has {often} been {b}.",
    "They {w} the {m} and {feel} the {a} {n} of the {t}.",
    "By {season} {count} {people} had seen the {n} and the {b} {m}.",
    "What the {people} {feel} was the {a} {n}, not the {m}.",
    "Its {n} {v} {when} {season}, which made the {t} {degree} {b}.",
    "The {m} is the {a} part of a {t}, and the {n} is {b}.",
    "Near the {t} a {b} {n} {w} for {count} days.",
    "One {n} of the {t} was {degree} {a}, the other {often} {b}.",
    "A {a} {n} and {count} {people} waited at the {t}.",
    "Old {people} {often} {feel} how the {n} {v} in {season}.",
    "The {n}, the {m} and the {t} were {degree} {b} that {season}.",
    "Without a {m}, the {people} of the {t} {w} in {season}.",
)
