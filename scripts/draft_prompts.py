"""What a target is asked for its draft to learn from: prompts of files, and prompts made up here.

Knows: files of prompts, chat templates, patterns of questions, the standard library of Python.
Does not know: models. Read next: draft_texts.py, where the target answers.
"""

import ast
import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD = 96  # prompts held out, or one of each kind; continued greedily and at temperature 1
TOPICS = """photosynthesis|black holes|the French Revolution|climate change|machine learning
the water cycle|volcanoes|ancient Egypt|the Roman Empire|DNA|gravity|electricity|the human heart
vaccines|the stock market|inflation|democracy|the Renaissance|Shakespeare|jazz music|chess
football|yoga|coffee|chocolate|gardening|solar energy|nuclear energy|electric cars|airplanes
bridges|the internet|operating systems|databases|sorting algorithms|recursion|encryption|robots
space travel|Mars|the Moon|galaxies|oceans|rain forests|deserts|whales|elephants|bees|dogs
dinosaurs|evolution|recycling|healthy eating|sleep|stress|friendship|leadership|time management
public speaking|job interviews|poetry|painting|photography|architecture|the piano|travel in Japan
Paris|Hawaii|hiking|cooking pasta|tea|economics|taxes|marketing|small businesses|remote work
education|libraries|human rights|philosophy|ethics|Greek mythology|fairy tales|detective stories
probability|statistics|algebra|geometry|prime numbers|chemistry|atoms|quantum mechanics|relativity
sound|weather|earthquakes|rivers|mountains|agriculture|the pyramids|the Olympic Games
Albert Einstein|Isaac Newton|Marie Curie|Leonardo da Vinci|Abraham Lincoln|Nelson Mandela|Mozart
Charles Darwin|Antarctica|India|China|Brazil|hurricanes|diabetes|the immune system|the brain
vitamins|social media|video games|smartphones|online privacy"""
ASK = """Explain {t} in simple terms.|What is {t}? Answer in one paragraph.
Write a short story about {t}.|Write a poem about {t}.|Give me five interesting facts about {t}.
How has {t} changed over the last hundred years?|What are the advantages and disadvantages of {t}?
Write an email to a friend about {t}.|Why is {t} important?
Compose a blog post about {t}, with a catchy title.|Summarize the history of {t}.
Compare {t} and {u}.|What are common misconceptions about {t}?
Explain {t} to a ten-year-old child.|How are {t} and {u} related?
Create an outline for an essay about {t}.|Write a dialogue between two people who discuss {t}.
Imagine you are an expert on {t}. What would you tell a beginner?
Write three quiz questions about {t}, with answers.
Pretend you are a teacher. Give a short lesson about {t}.|What would happen if {t} did not exist?
Describe {t} using vivid language. Please answer in fewer than two paragraphs.
Can you recommend books about {t}?
Help me write a headline for an article about {t}. Propose 4 options.|Tell me a joke about {t}.
Write a persuasive paragraph about {t}.|What is the future of {t}?
Discuss the causes and effects of {t}."""
THINGS = "the telephone|the light bulb|penicillin|paper|the bicycle|the radio|the laser|the camera"
ABOUT_THINGS = "Who invented {t}?|When was {t} invented?|How does {t} work?|What is {t} made of?"
PLACES = "France|Germany|Spain|Italy|Egypt|Kenya|India|China|Japan|Australia|Canada|Mexico|Iran"
ABOUT_PLACES = """What is the capital of {t}?|How many people live in {t}?
When did {t} become independent?
What language is spoken in {t}?
What currency is used in {t}?|What food is {t} famous for?"""
WORKS = "Romeo and Juliet|Moby Dick|War and Peace|Hamlet|Frankenstein|Dracula|1984|Don Quixote|Emma"
ABOUT_WORKS = """Who wrote {t}?|When was {t} published?|Where does {t} take place?
Who is the main character in {t}?"""
PEOPLE = "Anna|Tom|Maria|James|Sarah|John|Emily|David|Lisa|Michael|Jen|Ali|Sally|Carlos|Ben|Grace"
GOODS = "apples|pencils|books|cookies|marbles|oranges|stickers|tickets|flowers|eggs|shirts"
SUMS = """{p} has {a} {x}. {q} gives {p} {b} more. Then {p} gives away {c}. How many are left?
A store sells {x} for ${c} each. {p} buys {a} and pays with a ${k} bill. How much is the change?
{p} picks {a} {x} on Monday. On Tuesday {p} picks {c} times as many. How many is that in total?
{p} works {c} hours a day for {b} days and earns ${a} an hour. How much money does {p} earn?
{p} reads {a} pages every day. A book has {k} pages. How many days does it take to read it?
A train travels {k} miles in {c} hours. What is its average speed?|If {a}x + {b} = {k}, what is x?
{p} buys {a} {x} at ${c} each, with a discount of 10%. How much does {p} pay?
What is {a} * {b} + {c}?
{p} is {a} years old. {q} is {c} years older. What will be the sum of their ages in {b} years?
A rectangle is {a} meters long and {b} meters wide. What are its area and its perimeter?"""
TASKS = """reverse a string|find the largest number in a list|check if a number is prime
count the words in a text|sort a list of numbers|compute the factorial of a number
merge two sorted lists|remove duplicates from a list|check if a string is a palindrome
compute Fibonacci numbers|read a file line by line|convert Celsius to Fahrenheit
count vowels in a string|implement binary search|implement a stack
compute the greatest common divisor|flatten a nested list|validate an email address
rotate a matrix|find anagrams|parse a CSV file|find the median"""
ABOUT_TASKS = """Write a function to {t} and explain how it works.|How do I {t} in Python?
Write JavaScript code to {t}."""
OPENINGS = """The history of {t} begins|In recent years, {t} has become
When we think about {t}, we often|{t} is one of the
Once upon a time, there was a person who loved {t}.|Many people believe that {t}
Scientists who study {t} have found that|Q: What is {t}?\nA:|In this article, we will discuss {t}"""


@dataclass
class Prompt:
    """Token ids to continue, and the file they came from, for the figures."""

    ids: list[int]
    kind: str


def read_prompts(args, tokenizer, vocab: int, asked=()) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from and prompts held out: each sixth of a file.

    A .jsonl file has a chat ("turns") or a plain "prompt" a line; any other file is one prompt.
    To those of the files come some made up here and those that the target asked; without a
    tokenizer, random ids.
    """
    rng = random.Random(args.seed)
    names = ["made", "asked", *(path.stem for path in args.prompts)]
    for flag, some in (("--prompts", names), ("--text", [path.stem for path in args.text])):
        if twice := [name for name in some if some.count(name) > 1]:
            raise ValueError(
                f"two files of {flag} are called {twice[0]}, or one has the name of prompts that "
                "are made up here: rename it, since what is in them goes by their names"
            )
    if tokenizer is None:
        kinds = {"random": [[rng.randrange(vocab), rng.randrange(vocab)] for _ in range(600)]}
    else:
        rows = {"made": made_prompts(args.seed)} | {
            path.stem: read_rows(path) for path in args.prompts
        }
        kinds = {kind: encoded(some, tokenizer) for kind, some in rows.items()}
    kinds |= {"asked": [prompt.ids for prompt in asked]} if asked else {}
    learn, held = [], []
    for kind, prompts in kinds.items():
        fit = [Prompt(ids, kind) for ids in prompts if 0 < len(ids) <= args.prompt_tokens]
        held += fit[5::6][: max(1, HELD // len(kinds))]
        learn += [prompt for n, prompt in enumerate(fit) if n % 6 != 5]
    if not learn:
        raise ValueError(
            f"no prompt has 1 to {args.prompt_tokens} tokens, wanted some: raise --prompt-tokens"
        )
    rng.shuffle(learn)
    return learn, held


def read_rows(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix != ".jsonl":
        return [{"prompt": text}]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON: correct it") from error
            if not isinstance(row, dict) or not {"prompt", "turns"} & row.keys():
                raise ValueError(
                    f'{path}, line {number}: got no "prompt" and no "turns", wanted one: add it'
                )
            rows.append(row)
    return rows


def encoded(rows: list[dict], tokenizer) -> list[list[int]]:
    """Ids of prompts. A chat is its first turn in the chat template, or alone where there is none.

    What two chats begin and end with is the template's: rendering it for each would take minutes.
    """
    head, tail = around_question(tokenizer)
    chats = [
        head + tokenizer.encode(row["turns"][0], False) + tail for row in rows if "turns" in row
    ]
    return chats + [tokenizer.encode(row["prompt"]) for row in rows if "prompt" in row]


def around_question(tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a chat template puts before and after a user's first words."""
    try:
        a, b = (tokenizer.encode_chat([{"role": "user", "content": text}]) for text in ("a", "Z"))
    except ValueError:
        return tokenizer.encode(""), []
    before = next(n for n, (x, y) in enumerate(zip(a, b)) if x != y)
    return a[:before], a[before + 1 :]


def split(text: str) -> list[str]:
    return [part for line in text.split("\n") for part in line.replace("\\n", "\n").split("|")]


def made_prompts(
    seed: int, chats: int = 3200, functions: int = 900, openings: int = 300
) -> list[dict]:
    """Rows as in a file of prompts, all different: {"turns": [...]} or {"prompt": ...}."""
    rng = random.Random(seed)

    def one_of(patterns: str, topics: str) -> str:
        t, u = (rng.choice(split(topics)) for _ in range(2))
        return rng.choice(split(patterns)).format(t=t, u=u)

    def sum_of() -> str:
        p, q = rng.sample(split(PEOPLE), 2)
        numbers = {"a": rng.randint(6, 40), "b": rng.randint(3, 20), "c": rng.randint(2, 8)}
        numbers["k"] = rng.randint(5, 30) * 10
        return rng.choice(split(SUMS)).format(p=p, q=q, x=rng.choice(split(GOODS)), **numbers)

    pairs = [(ASK, TOPICS)] * 4 + [(ABOUT_TASKS, TASKS)] * 2
    pairs += [(ABOUT_THINGS, THINGS), (ABOUT_PLACES, PLACES), (ABOUT_WORKS, WORKS)]
    asked = [one_of(*rng.choice(pairs)) if n % 4 else sum_of() for n in range(chats)]
    opened = [one_of(OPENINGS, TOPICS) for _ in range(openings)]
    stubs = library_stubs() if functions else []
    rng.shuffle(stubs)
    rows = [{"turns": [text]} for text in dict.fromkeys(asked)]
    rows += [{"prompt": text} for text in dict.fromkeys(opened + stubs[:functions])]
    rng.shuffle(rows)
    return rows


def library_stubs() -> list[str]:
    """Functions of the standard library, cut after their docstrings, in the order of its files."""
    stubs = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and 60 < len(ast.get_docstring(node) or "") < 700:
                stubs.append("\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]) + "\n")
    return stubs
