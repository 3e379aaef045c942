"""Rank and full-rank factorisation of a matrix of integers, without rounding.

Elimination without fractions (sympy's, which torch brings along) gives the reduced row echelon form, which is unique.
Its R non-zero rows are Qᵀ, and the columns of X in which they have their leading ones are P: column j of X is a
combination of P's columns whose coefficients stand in column j of the echelon form (Strang, *Linear Algebra*,
"A = CR"), so

    X = P Qᵀ     exactly, P of integers.

Integers grow as they must; made for matrices that a person writes down, up to some hundred rows.
"""

from collections.abc import Sequence
from fractions import Fraction

Matrix = list[list[Fraction]]


def reduced_row_echelon(rows: Sequence[Sequence[int]]) -> tuple[Matrix, list[int]]:
    """(the non-zero rows of the reduced row echelon form, the columns of their leading ones).

    Raises ValueError for rows of different lengths and for a matrix without entries.
    """
    from sympy import ZZ  # type: ignore[import-untyped]
    from sympy.polys.matrices import DomainMatrix  # type: ignore[import-untyped]

    if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
        raise ValueError("not a matrix: rows must have the same length, and there must be at least one entry")
    integers = DomainMatrix([[ZZ(value) for value in row] for row in rows], (len(rows), len(rows[0])), ZZ)
    echelon, denominator, pivots = integers.rref_den()
    fractions = [[Fraction(int(value), int(denominator)) for value in row] for row in echelon.to_list()[: len(pivots)]]
    return fractions, list(pivots)


def exact_factorisation(rows: Sequence[Sequence[int]]) -> tuple[Matrix, Matrix]:
    """P, M rows of R entries, and Qᵀ, R rows of N entries, with X = P Qᵀ; R is the rank."""
    echelon, pivots = reduced_row_echelon(rows)
    return [[Fraction(row[column]) for column in pivots] for row in rows], echelon
