"""What training sees of a data set, before training: ``python -m fourm.tools.preview CONFIG --out page.html``.

``samples`` draws what is shown, ``page`` and ``sheet`` show it. ``__main__`` is an entry script: like those in the
repository's root it may import from every layer, here for the pictures, and nothing imports it.
"""
