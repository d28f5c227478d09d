"""Facts of the real world that a small language model may know, and prose: what edits of other things should leave."""

from __future__ import annotations

#: Prompt with one {}, and pairs of subject and answer.
KINDS = (
    (
        "The capital of {} is",
        """
    France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, China Beijing, Russia Moscow,
    Greece Athens, Austria Vienna, Egypt Cairo, Cuba Havana, Peru Lima, Portugal Lisbon, Poland Warsaw,
    Sweden Stockholm, Norway Oslo, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, Hungary
    Budapest, Belgium Brussels, Turkey Ankara, Iran Tehran, Iraq Baghdad, Thailand Bangkok, Kenya
    Nairobi, Canada Ottawa, Chile Santiago, Venezuela Caracas, Syria Damascus, Lebanon Beirut, Vietnam
    Hanoi, Afghanistan Kabul, Ukraine Kyiv, Romania Bucharest, Bulgaria Sofia, Serbia Belgrade, Croatia
    Zagreb, England London
        """,
    ),
    (
        "The people of {} speak",
        """
    Brazil Portuguese, Mexico Spanish, Austria German, Argentina Spanish, Egypt Arabic, Japan Japanese,
    China Chinese, Israel Hebrew, Poland Polish, Greece Greek, Turkey Turkish, Sweden Swedish, Italy
    Italian, France French
        """,
    ),
    (
        "{} is a country in",
        """
    Kenya Africa, Nigeria Africa, Egypt Africa, Ghana Africa, India Asia, Japan Asia, Thailand Asia,
    Nepal Asia, France Europe, Spain Europe, Poland Europe, Sweden Europe
        """,
    ),
    (
        "The opposite of {} is",
        """
    hot cold, big small, up down, black white, day night, old new, left right, good bad, open closed,
    rich poor, early late, love hate, war peace, true false
        """,
    ),
)


def questions() -> list[tuple[str, str]]:
    """Prompts and answers of all kinds."""
    found = []
    for prompt, pairs in KINDS:
        for pair in pairs.split(","):
            subject, answer = pair.split()
            found.append((prompt.replace("{}", subject), f" {answer}"))
    return found


#: Prose of this project's own, on things that no edit is about.
HELDOUT = (
    "The river comes down from the hills in the north, passes under three old bridges, and widens before it "
    "reaches the sea. In spring, when the snow melts, the water rises quickly and the fields on both banks are "
    "flooded.",
    "To bake a simple loaf, mix flour, water, salt and a little yeast, and let the dough rest until it has "
    "doubled in size. Shape it gently, let it rise once more, and bake it in a very hot oven until the crust is "
    "brown.",
    "When light passes from air into water it changes its direction, because it travels more slowly in water. "
    "This is why a straight stick that stands in a pond seems to be broken at the surface.",
    "The meeting began late. Two members of the committee had missed the train, and the chair decided to start "
    "with the report on the budget, which showed that the library had spent less than in the year before.",
    "She had kept the letters in a wooden box for thirty years. Now she read them again, one after the other, and "
    "was surprised how young the handwriting looked, and how little of what they had feared had come to pass.",
    "A computer program is a list of instructions. The machine follows them one by one, very fast and without any "
    "idea of what they are for, so a small mistake in one line can spoil the result of all the others.",
    "Most birds that live in cold countries fly south in autumn. They find their way by the sun, by the stars and "
    "by the magnetic field of the earth, and many of them come back to the same tree in the following year.",
    "The old man sat in front of the shop and watched the children play in the street. It had rained in the "
    "morning, and they had built a dam of stones and mud, behind which a small lake had formed.",
)
