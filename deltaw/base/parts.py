"""What a document of a batch is to an objective: which answer of a pair, or how an answer was judged.

The two answers to a prompt are neighbours, the chosen one first, and always in the same batch. A judged answer stands
alone. A document of another learner is PLAIN to this one (`Batch.labelled_for`). A prompt that is only asked has an
answer in its row (ANSWERED), or none (ASKED).
"""

PLAIN, CHOSEN, REJECTED, DESIRABLE, UNDESIRABLE, ASKED, ANSWERED = range(7)
PART_NAMES = ("", "chosen", "rejected", "desirable", "undesirable", "asked", "asked, with an answer in its row")
