"""Rank and full-rank factorisation of a matrix of integers or fractions, without rounding.

Gauss-Jordan elimination in rationals gives the reduced row echelon form, which is unique. Its R non-zero rows are Qᵀ,
and the columns of X in which they have their leading ones are P: column j of X is a combination of P's columns whose
coefficients stand in column j of the echelon form (Strang, *Linear Algebra*, "A = CR"), so

    X = P Qᵀ     exactly, P of integers where X is.

Elimination itself is in integers (Bareiss 1968): multiplied crosswise and divided by the last pivot, which leaves no
remainder, since every entry is a minor of X. Fractions, reduced at every step, take twenty times as long. Python's
integers grow as they must; made for matrices that a person writes down, up to some hundred rows.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

Matrix = list[list[Fraction]]


def reduced_row_echelon(rows: Sequence[Sequence[int | Fraction]]) -> tuple[Matrix, list[int]]:
    """(the non-zero rows of the reduced row echelon form, the columns of their leading ones).

    Raises ValueError for rows of different lengths and for a matrix without entries.
    """
    if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
        raise ValueError("not a matrix: rows must have the same length, and there must be at least one entry")
    scales = [lcm(*(Fraction(value).denominator for value in row)) for row in rows]
    left = [[int(value * scale) for value in row] for row, scale in zip(rows, scales, strict=True)]
    pivots: list[int] = []
    lead = 1
    for column in range(len(left[0])):
        at = len(pivots)
        found = next((number for number in range(at, len(left)) if left[number][column]), None)
        if found is None:
            continue
        left[at], left[found] = left[found], left[at]
        before, lead = lead, left[at][column]
        for number, row in enumerate(left):
            if number != at:
                factor = row[column]
                pairs = zip(row, left[at], strict=True)
                left[number] = [(lead * value - factor * pivot) // before for value, pivot in pairs]
        pivots.append(column)
        if len(pivots) == len(left):
            break
    return [[Fraction(value, lead) for value in row] for row in left[: len(pivots)]], pivots


def exact_factorisation(rows: Sequence[Sequence[int | Fraction]]) -> tuple[Matrix, Matrix]:
    """P, M rows of R entries, and Qᵀ, R rows of N entries, with X = P Qᵀ; R is the rank."""
    echelon, pivots = reduced_row_echelon(rows)
    return [[Fraction(row[column]) for column in pivots] for row in rows], echelon
