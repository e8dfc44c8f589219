"""Preview what training sees of a data set: ``python -m fourm.tools.preview CONFIG --out page.html``.

``command`` defines the options, ``samples`` and ``sequences`` draw and mask the samples, and ``page`` writes the HTML.
"""
