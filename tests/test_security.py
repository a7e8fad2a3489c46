"""What a file that others wrote cannot do: run, be unpickled, or name a place outside of where it belongs."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import subprocess
import sys
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commands.options import check_study_name, plain
from searcher.errors import LongRopeError
from searcher.extension import STAGE_NAME
from workers.model import ModelRequest, load_model, load_tokenizer, resolve_folder

ROOMS = ("searcher", "workers", "storage", "commands")
ROOT = Path(__file__).parent.parent


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.marker, "w")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "was-run"


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_code(folder: Path, marker: Path, model_type: str) -> Path:
    """A model folder whose config, model and tokenizer ask for code of its own."""
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    (folder / "mine.py").write_text(code + "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n")
    places = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    change(folder / "config.json", model_type=model_type, auto_map=places)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Tokenizer", "mine.Tokenizer"]})
    return folder


def load(folder: Path, trust: bool = False) -> None:
    load_tokenizer(folder, trust)
    load_model(ModelRequest(str(folder), 256, trust_remote_code=trust))


def test_code_of_an_unknown_family_is_refused(folder: Path, marker: Path) -> None:
    with pytest.raises(LongRopeError, match="allow it with --trust-remote-code"):
        load_model(ModelRequest(str(with_code(folder, marker, "mine")), 256))
    assert not marker.exists()


def test_code_beside_a_known_family_is_passed_over(folder: Path, marker: Path) -> None:
    load(with_code(folder, marker, "llama"))
    assert not marker.exists()


def test_code_is_run_where_it_is_asked_for(
    folder: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the tests above would see it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    load_model(ModelRequest(str(with_code(folder, marker, "mine")), 256, trust_remote_code=True))
    assert marker.exists()


def test_pickled_weights_alone_are_refused(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(LongRopeError, match="weights are only read from safetensors"):
        resolve_folder(str(folder))
    with pytest.raises(LongRopeError, match="weights are only read from safetensors"):
        load(folder)
    assert not marker.exists()


def test_pickled_weights_beside_others_are_passed_over(folder: Path, marker: Path) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Touch(marker)))
    load(folder)
    assert not marker.exists()


def test_pickled_weights_that_an_index_names_are_not_run(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "evil.bin").write_bytes(pickle.dumps(Touch(marker)))
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "evil.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LongRopeError, match=r"should name .safetensors files beside it alone, not 'evil.bin'"):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../model/other.safetensors", "/other.safetensors", 3, None])
def test_an_index_names_files_of_its_folder_alone(folder: Path, name: object) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(LongRopeError, match=r"should name .safetensors files beside it alone"):
        load(folder)


def test_a_pickle_named_safetensors_is_not_run(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(LongRopeError, match="cannot be loaded as safetensors"):
        load(folder)
    assert not marker.exists()


def test_the_pickle_of_these_tests_does_run(marker: Path) -> None:
    pickle.loads(pickle.dumps(Touch(marker))).close()
    assert marker.exists()


def test_no_module_unpickles_evaluates_or_unpacks() -> None:
    found = set()
    for path in (p for room in ROOMS for p in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found |= {(path.name, name) for name in names} & {
                    (path.name, name) for name in ("pickle", "cloudpickle", "dill", "marshal", "shelve", "tarfile")
                }
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("eval", "exec", "torch.load", "shutil.unpack_archive", "yaml.load", "os.system"):
                    found.add((path.name, called))
                if any(k.arg == "shell" or (k.arg == "allow_pickle") for k in node.keywords):
                    found.add((path.name, ast.unparse(node)))
    assert not found


names = st.one_of(
    st.text(max_size=70),
    st.sampled_from(
        ["..", ".", "/", "../../up", "/etc/passwd", ".ssh", "a/b", "a\\b", "a\0b", "-x", "a\n", "C:x", "~"]
    ),
)


def stays(folder: Path, name: str) -> None:
    place = folder / name
    assert place.parent == folder
    assert place.name == name
    assert not name.startswith((".", "-", "~"))
    assert name.isprintable()


@given(name=names)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_names_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    """Of studies and stages, given or made up, which become names of files and folders."""
    stays(tmp_path, plain(name))
    check_study_name(plain(name))
    if STAGE_NAME.fullmatch(name):
        stays(tmp_path, name)
    try:
        check_study_name(name)
    except LongRopeError:
        return
    stays(tmp_path, name)


LISTENING = """
import json, psutil
from workers.settings import prepare_local_ray

prepare_local_ray()
import ray
from workers.actor import create_worker, start_cluster

start_cluster(1)
ray.get(create_worker(1, 0.0).pid.remote())
found = {}
own = psutil.Process()
for process in [own, *own.children(recursive=True)]:
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            found.setdefault(process.name(), []).append(connection.laddr.ip)
print(json.dumps(found))
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_of_our_own_listens_on_loopback_alone(process_environment: dict[str, str], tmp_path: Path) -> None:
    run = [sys.executable, "-c", LISTENING]
    ended = subprocess.run(run, env=process_environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    assert {"gcs_server", "raylet"} <= set(found)
    addresses = [ip_address(address) for each in found.values() for address in each]
    mapped = [a.ipv4_mapped or a if isinstance(a, IPv6Address) else a for a in addresses]
    assert all(address.is_loopback for address in mapped), found
