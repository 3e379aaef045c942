"""Text -> tokens and masks. No model, no GPU.

The way of a row: `read` (source -> rows), `forms` (row -> document), `render` (document -> example, with `encode` and
`template`), `dataset` (all of that, split and counted), `loader` (examples -> steps), `pack` (examples -> batch).
"""
