"""Talk: questions, requests and answers of daily life, told as dialogue, as a play, or line by line.

Unusual: it makes sure that every word a chat will ask with ("which", "list", "remove", ...) is known to the base from
plain English, though no exercise is asked in these words here.
"""

import random

from scripts.tiny import words

ASKED = """What is the name of this {animal}?|It is called {name}.
Which {thing} is yours?|The {colour} one.
Which of these {things} do you want?|The largest one among them.
Where is the {thing}?|It is at the {place}, next to the door.
Where does the {animal} live?|It lives near the {place}.
Who has the {food}?|Only the {animal} does. It had some for the night.
Whose {thing} is that?|It is mine. Whose is this one?
How many {foods} do you want?|Give me three of them, please.
How many {animals} are there?|I can not say. The number is large.
How often do you go to the {place}?|Not as often as you do.
How much does this {thing} cost?|It costs a lot. I can not pay so much.
How do you spell your name?|It begins with {letter} and ends with {other}.
How do you {verb} so well?|I do it every day, from start to end.
What time is it?|It is late. Look at the clock.
What is the date today?|It is {day} {month}.
Which day is it today?|Today is {weekday}.
Which day of the week comes next?|I think that it is {weekday}.
What colour is your {thing}?|It is {colour}, and the other one is {hue}.
What did you find among these {things}?|Only one {food}. What a thing!
Can you help me with this {thing}?|Yes, I can. What do I do?
Can I find {foods} here?|Read this list and you will know.
Could you put these {things} in the {place}?|I will do it later.
Is it more or less than you want?|It is equal to what I want.
Who is the tallest of you?|The one with the {colour} {thing}.
Is the {animal} bigger than the {beast}?|No, it is the smallest of the three.
What did the {job} say?|Not much. He was asked the same thing.
Which word did you read?|It was the last one in the book.
What is the question?|The question is, who has my {thing}?
What is in the table drawer?|Some {things} and a dictionary.
What comes after the {thing}?|Nothing. That is the end of the list.""".split("\n")

SAID = """Please give me the {colour} {thing}.
Please say that word again and repeat it.
Please write to me as often as you can.
Please change your wet socks!
Please turn around and look at the {animal}.
Please order some {foods} for us.
Please leave out the {food}, I do not like it.
Please shout when you see the {animal}!
Read this letter, then read it again from the last word to the first.
Read the rest of the book later.
Write your name here, in upper case, and the date below.
Write this down, letter by letter.
Find a {thing} and bring it to me.
Find out how many {animals} live here.
Look at this! There are {foods} in the table drawer.
Look at the {animal}, it goes in reverse.
Give the {food} to the {animal}.
Give me the rest of these {foods}.
Remove the {thing} from the table.
Remove your shoes, but leave the {colour} ones out in the sun.
Replace the old {thing} by a new one.
Replace the {food} if it is bad.
Order is what we want: every {thing} in its place.
Order these {things} by their colour.
Continue on this path and you come to the {place}.
Continue to {verb} until the bell rings.
Work out how to open this {thing}.
Compare this {thing} with that one.
Subtract what you have to pay from what you get.
Say what you think in your own words, and write it as it is.
Sort the {things} by size, or by age instead.
It was minus three in the {place} this morning.
Three words were on the {thing}: one, two, three.
Here is a list of things that we want: {foods}, {things} and some rope.
Here are some {foods}. Keep one of them.
Today we go to the {place}, and on {weekday} to the {site}.
Today I have read one word in a dictionary: {food}.
Instead of the {thing} he had only {article_food}.
The letters of the alphabet are on the wall, in a row from a to z.
The letter {letter} does not occur in my name.
The product of this farm is {food} pie.
The sum of all this work is one {thing}.
The price was multiplied by the cold winter.
The number of the house is odd, the one of the barn is even.
The sequence of the bells was the same as before.
The user of this {thing} must be careful.
The assistant of the {job} was kind and helpful.
The {thing} is a clever system of wheels.
The answer is not easy. Answer briefly, then sit down.
They convert the {place} into a school, with a rising wall around it.
In which place did you put it? At which hour? I do not know!
In any case, the {animal} does not like {foods}.
Hello! Good morning! What can I do for you?
You are a good clerk, and you read well.
The result of all the talk was nothing. Now we are alone.
I see {animals} on the hill. How many? Not less than three.
That is too hard for me. Let me think about it for a while.
Well, who knows? I would say so, but I am not sure.""".split("\n")


def _fill(sentence: str, rng: random.Random) -> str:
    """The sentence with things of the world in its places."""
    thing, other = rng.sample(words.OBJECTS, 2)
    colour, hue = rng.sample(words.COLOURS, 2)
    animal, beast = rng.sample(words.ANIMALS, 2)
    place, site = rng.sample(words.PLACES, 2)
    food = rng.choice(words.FOODS)
    return sentence.format(
        thing=thing,
        things=words.plural(other),
        colour=colour,
        hue=hue,
        animal=animal,
        animals=words.plural(beast),
        beast=beast,
        place=place,
        site=site,
        food=food,
        foods=words.plural(food),
        article_food=words.article(food),
        letter=rng.choice("abcdefghijklmnopqrstuvwxyz"),
        other=rng.choice("abcdefghijklmnopqrstuvwxyz"),
        verb=rng.choice(words.VERBS),
        name=rng.choice(words.NAMES),
        job=rng.choice(("doctor", "baker", "farmer", "teacher", "sailor")),
        day=rng.randint(1, 28),
        month=rng.choice(words.MONTHS),
        weekday=rng.choice(words.WEEKDAYS),
    )


def _exchange(rng: random.Random) -> list[str]:
    """A question and its answer, or something said."""
    if rng.random() < 0.5:
        return _fill(rng.choice(ASKED), rng).split("|")
    return [_fill(rng.choice(SAID), rng)]


def talk(rng: random.Random) -> str:
    """Three to six exchanges of two people."""
    pair = rng.sample(words.NAMES, 2)
    layout = rng.random()
    lines = []
    for i in range(rng.randint(3, 6)):
        for j, said in enumerate(_exchange(rng)):
            who = pair[(i + j) % 2]
            if layout < 0.4:
                comma = said if said[-1] in "?!" else f"{said[:-1]},"
                lines.append(f'"{comma}" {"asked" if said[-1] == "?" else "said"} {who}.')
            else:
                lines.append(f"{who}: {said}" if layout < 0.7 else said)
    return " ".join(lines) if layout < 0.4 else "\n".join(lines)
