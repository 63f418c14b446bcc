"""Time: a cell's step repeated, and the gradient brought back through all steps.

It knows no cell: only the contract in `cells.cell`. `recurrence.recurrence` is the one
entry; it takes `Options`, `Constants` and `Arguments`.
"""
