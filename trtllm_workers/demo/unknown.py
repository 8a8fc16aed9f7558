"""Makes up questions beyond the FAQ. Knows no tokenizer and no model."""

from __future__ import annotations

import random

UNKNOWN_THINGS = tuple(
    """photosynthesis|a dog|a cat|an elephant|the moon|the sun|a black hole|gravity|love|happiness|
    the weather today|a football|chess|tennis|the Olympic games|the stock market|inflation|bitcoin|
    a mortgage|democracy|the French revolution|Napoleon|Einstein|Shakespeare|Mozart|Beethoven|a violin|
    a guitar|jazz|a volcano|an earthquake|the Amazon river|Mount Everest|Paris|Berlin|Tokyo|Brazil|
    Australia|pizza|a good recipe for soup|chocolate|coffee|tea|bread|wine|vitamin C|a virus|a vaccine|
    DNA|evolution|a dinosaur|penicillin|a prime number|the Pythagorean theorem|an integral|pi|algebra|
    quantum mechanics|thermodynamics|a semiconductor|a laser|a battery|a rocket|Mars|a comet|the galaxy|
    JavaScript|React|a linked list|quicksort|a binary tree|SQL|MongoDB|PostgreSQL|Kafka|Redis|Excel|
    Photoshop|WordPress|an iPhone|Android|Windows|a printer|Bluetooth|a bicycle|a car engine|a train|
    an airplane|a boat|a garden|roses|a tree|birds|fishing|yoga|meditation|a marathon|philosophy|Plato|
    religion|a novel|a sonnet|the Mona Lisa|a camera|a movie|the best film|a holiday|a birthday party|
    a wedding|my homework|my dog's name|the time|the date today|the news|a passport|taxes|a contract|
    the president|the queen of England|the largest city|the highest mountain|the speed of light|
    a blorf|zindo|the quux of a frob|a marsupial|the ozone layer|glass|iron|gold|an atom|a molecule|
    acid rain|a cloud|snow|the rainbow|sleep|dreams|memory loss|a headache|back pain|a doctor""".replace(
        "\n", ""
    ).split("|")
)
UNKNOWN_FORMS = (
    *("What is {x}?", "Explain {x}", "Tell me about {x}", "What do you know about {x}?", "{x}"),
    *("What does {x} do?", "How does {x} work?", "Who invented {x}?", "Where do I find {x}?"),
    *("What is {x} for?", "How do I get {x}?", "How do I make {x}?", "How old is {x}?"),
    *("Why is there {x}?", "What is the price of {x}?", "What is the history of {x}?"),
    *("Write an essay about {x}", "Give me three facts about {x}", "What is the meaning of {x}?"),
    *("Do you like {x}?", "Can you recommend {x}?", "What is the best thing about {x}?"),
    *("Describe {x}", "Define {x}", "I want to buy {x}", "When was {x} discovered?"),
    *("What is the difference between {x} and {y}?", "Which is better, {x} or {y}?", "{x} or {y}?"),
    *("How do I install {x}?", "What color is {x}?", "Can you explain {x} to a child?"),
)
UNKNOWN_QUESTIONS = tuple(
    """What is the capital of France?|What is the capital of Italy?|What is the capital of Japan?|
    What is the capital of Spain?|Who is the president of the United States?|What is 2+2?|What is 3 x 7?|
    What is 12 plus 30?|What is the square root of 16?|Solve x + 3 = 5|What time is it?|
    What day is today?|What is the weather in London?|Will it rain tomorrow?|Who won the world cup?|
    Who wrote Faust?|Who painted the Mona Lisa?|Who was the first man on the moon?|
    How many people live in China?|How far is the sun?|How tall is Mount Everest?|How old is the earth?|
    Translate hello to French|Translate this sentence into German|How do you say cat in Spanish?|
    Write a function that sorts a list|Write a Python program|Write code for fibonacci|Fix this code|
    Write an email to my boss|Write a letter|Summarize this text|Summarize the following article|
    Recommend a good book|Recommend a restaurant|What should I cook tonight?|How do I bake bread?|
    How do I cook pasta?|How do I lose weight?|How do I learn the piano?|How do I fix my car?|
    How do I tie a tie?|Which phone should I buy?|Which car is the best?|What is the meaning of life?|
    Is there a god?|Can you drive a car?|Do you love me?|Can you book a flight?|Order a pizza|
    Play some music|Sing a song|Draw a picture|Open the door|Turn on the light|Once upon a time|
    The quick brown fox jumps over the lazy dog|Lorem ipsum dolor sit amet|Repeat after me: apple|
    Give me a recipe|Give me advice about money|What is your favorite color?|Where do you live?|
    How old are you?|Do you eat?|What is in the news?|Roses are red, violets are|List ten animals|
    Name three fruits|What rhymes with house?|Convert 10 miles to kilometers|asdf|qwerty|blah blah|
    foo bar baz|xyzzy|1234|42|???|...|lol|hmm""".replace("\n", "").split("|")
)


def unknown_question(rng: random.Random) -> str:
    """Make up a question that the FAQ does not answer."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(UNKNOWN_QUESTIONS).strip()
    if kind < 0.45:
        return " ".join(_nonsense(rng) for _ in range(rng.randint(1, 6)))
    x, y = (thing.strip() for thing in rng.sample(UNKNOWN_THINGS, 2))
    if rng.random() < 0.15:
        x = _nonsense(rng)
    return rng.choice(UNKNOWN_FORMS).format(x=x, y=y)


def _nonsense(rng: random.Random) -> str:
    parts = (
        "ba",
        "lo",
        "ri",
        "ten",
        "mu",
        "shi",
        "ka",
        "dor",
        "vel",
        "ny",
        "pra",
        "gon",
        "x",
        "el",
    )
    return "".join(rng.choice(parts) for _ in range(rng.randint(2, 4)))
