"""What training sees of a data set, before training: ``python -m fourm.tools.preview CONFIG --out page.html``.

``command`` holds the options, ``samples`` and ``sequences`` draw what is shown, and ``page`` writes the HTML.
"""
