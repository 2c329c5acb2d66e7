"""Tasks that the project generates: minimal pairs from templates, nothing to download.

To add one, write a module with `generate(split, seed)` and a YAML file with its lexicon, and add entries here, in
`Source.generator` and in the task table.
"""

from extensions.data.generated import acceptability, reviews

GENERATORS = {"acceptability": acceptability.generate, "reviews": reviews.generate}
