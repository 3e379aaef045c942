"""benchmarks/filler.py: what sizes add to batches."""

from benchmarks.filler import STEPS, of_documents, row


def test_batches_are_documents_as_many_as_fit() -> None:
    batches = of_documents(4096, (0.2, 0.4))
    assert len(batches) == STEPS and all(2048 < tokens <= 4096 for tokens, _, _ in batches)
    assert all(0 < labels < tokens / 2 and documents > 0 for tokens, documents, labels in batches)


def test_a_batch_of_a_size_has_no_filler() -> None:
    assert row("full", [(4096, 16, 4096)] * 3, 4096, 512)[3:] == ["0.0%", "0.0%", "1"]
    assert row("half of a part", [(4096 - 64, 16, 4096 - 64)], 4096, 512)[3] == "1.6%"
