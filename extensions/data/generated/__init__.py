"""Tasks that the project generates: minimal pairs from templates, nothing to download.

A new one is a module with `generate(split, seed)`, its words in a YAML file beside it, an entry here, in
`Source.generator` and in the task table.
"""

from extensions.data.generated import acceptability, reviews

GENERATORS = {"acceptability": acceptability.generate, "reviews": reviews.generate}
