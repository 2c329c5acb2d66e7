import pytest
from tokenizer_families import FAMILIES


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name == "smollm2" else ()) for name in FAMILIES],
)
def family(request, tmp_path_factory):
    return FAMILIES[request.param](tmp_path_factory.mktemp("tokenizers") / request.param)
