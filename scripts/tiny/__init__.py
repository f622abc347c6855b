"""The embedded default: a seeded generator of a little world, its tokenizer, and the data sets made from it.

Nothing here is downloaded or copied: every sentence is written by the grammars and word lists of this folder, so
the corpus, the tokenizer and the model trained on them carry the licence of this repository.

    words.py        the word lists of the little world
    language.py     simple English: stories with causes, notes, and facts
    talk.py         questions and requests of daily life, which make a chat's words known
    task.py         what a task is: draw an instance, solve it, phrase it; the split into train and held-out
    numeric.py      tasks on numbers; strings.py: on words and letters; world.py: on dates, units, texts and tables
    tasks.py        the literal table TASKS
    sea.py          the second domain: the pilot's log of an invented coast, with a vocabulary of its own
    documents.py    the pretraining documents: stories, worksheets, word problems
    chats.py        chats, preference pairs, prompts with verifiable answers
    make_data.py    writes the files (run it with --help)
    make_tokenizer.py   trains the tokenizer
    score.py        exact match per task of a trained model
"""
