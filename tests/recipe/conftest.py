import pytest

from extensions.recipe import load_recipe


@pytest.fixture
def load(tmp_path):
    def load_text(text, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path, overrides)

    return load_text
