"""What a verb does: names -> values -> one `Result` (show/result.py).

A file per verb, with one function, `VERB_named`: it takes names as the user typed them, reads what lies under them once
(named.py), claims what it will write before it computes anything, calls the functions of the rooms below, and says what
came of it in words. Nothing is measured or computed here, and nothing printed; deltaw/cli shows the Result.
"""
