"""What a document of a batch is to an objective: which answer of a pair, or how an answer was judged.

The two answers to a prompt are neighbours, the chosen one first, and always in the same batch. A judged answer stands
alone. A document of another learner is PLAIN to this one (`Batch.labelled_for`).
"""

PLAIN, CHOSEN, REJECTED, DESIRABLE, UNDESIRABLE = range(5)
PART_NAMES = ("", "chosen", "rejected", "desirable", "undesirable")
