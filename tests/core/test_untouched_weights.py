"""Weights that still are what their file holds count by their place in the file; every change of them is noticed."""

import ctypes
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nnterp.identity import _mapped, _weights, checkpoint_of, digest_of_weights
from nnterp.testing import tiny_model, tiny_tokenizer

FILE = "model.safetensors"
WEIGHT = "model.layers.1.mlp.up_proj.weight"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the page table is Linux'")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A llama saved to a folder."""
    where = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return where


@pytest.fixture(params=["the kernel tells", "nothing is told"])
def loaded(request, original, tmp_path, monkeypatch):
    """(module, files it was loaded from), on systems that have the page table, and on others."""
    if request.param == "nothing is told":
        monkeypatch.setattr(_mapped.sys, "platform", "darwin")
    return load(shutil.copytree(original, tmp_path / "model"))


def load(where):
    files = checkpoint_of(str(where), {})
    return AutoModelForCausalLM.from_pretrained(where), files


def tensors_of(module):
    return [*module.named_parameters(), *module.named_buffers()]


def digest(module, files):
    return digest_of_weights(tensors_of(module), files)


def places(module, files):
    named = dict(module.named_parameters())
    return dict(zip(named, _mapped.places_in_files(named.values(), files), strict=True))


def in_place(module, weight, file):
    with torch.no_grad():
        weight.mul_(1.5)


def in_inference_mode(module, weight, file):
    with torch.inference_mode():
        weight[0, 0] += 1


def through_data(module, weight, file):
    weight.data[3, 5] += 1e-3


def other_data(module, weight, file):
    weight.data = weight.data * 2


def copied_into(module, weight, file):
    with torch.no_grad():
        weight.copy_(torch.ones_like(weight))


def detached(module, weight, file):
    weight.detach()[-1, -1] = 3


def numpy_view(module, weight, file):
    weight.detach().numpy()[2] = 0


def dlpack(module, weight, file):
    torch.from_dlpack(weight.detach())[2] = 0


def pointer(module, weight, file):
    ctypes.memset(weight.data_ptr() + 7, 1, 1)


def storage(module, weight, file):
    byte = weight.storage_offset() * 4 + 6
    weight.untyped_storage()[byte] = weight.untyped_storage()[byte] ^ 1


def bits(module, weight, file):
    weight.data.view(torch.int32)[4, 4] ^= 1


def rows_swapped(module, weight, file):
    weight.data[[10, 20]] = weight.data[[20, 10]]


def state_dict(module, weight, file):
    module.load_state_dict({name: own + 1 for name, own in module.state_dict().items()})


def state_dict_assigned(module, weight, file):
    module.load_state_dict({name: own + 1 for name, own in module.state_dict().items()}, assign=True)


def optimizer(module, weight, file):
    module(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    torch.optim.SGD([weight], lr=1.0).step()


def other_parameter(module, weight, file):
    module.get_submodule("model.layers.1.mlp.up_proj").weight = nn.Parameter(weight.detach() * 2)


def swapped_tensors(module, weight, file):
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 2))


def another_part_of_the_file(module, weight, file):
    weight.data = module.get_parameter("model.layers.0.mlp.up_proj.weight").data


def transposed(module, weight, file):
    square = module.get_parameter("model.layers.1.self_attn.o_proj.weight")
    square.data = square.data.T


def adapter(module, weight, file):
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    mlp = module.get_submodule("model.layers.1.mlp")
    mlp.up_proj = Adapted(mlp.up_proj)


def half_precision(module, weight, file):
    module.to(torch.bfloat16)


def buffer(module, weight, file):
    module.model.rotary_emb.inv_freq.data.mul_(1.01)


def file_written(module, weight, file):
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    with file.open("r+b") as opened:
        opened.write(content)


def file_mapped(module, weight, file):
    np.memmap(file, mode="r+")[-2] ^= 1


EDITS = [in_place, in_inference_mode, through_data, other_data, copied_into, detached, numpy_view, dlpack, pointer]
EDITS += [storage, bits, rows_swapped, state_dict, state_dict_assigned, optimizer, other_parameter, swapped_tensors]
EDITS += [another_part_of_the_file, transposed, adapter, half_precision, buffer, file_written, file_mapped]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_noticed(edit, loaded):
    module, files = loaded
    before = digest(module, files)
    assert digest(module, files) == before
    edit(module, module.get_parameter(WEIGHT), files.folder / FILE)
    assert digest(module, files) != before


def test_an_edit_of_any_tensor_is_noticed(loaded):
    """The first number of each, then the last: pages are shared by neighbours in the file."""
    module, files = loaded
    seen = {digest(module, files)}
    for _, tensor in tensors_of(module):
        for index in (0, -1):
            tensor.data.view(-1)[index] += 0.5
            seen.add(found := digest(module, files))
            assert digest(module, files) == found
    assert len(seen) == 1 + 2 * len(tensors_of(module))


def test_the_same_files_have_the_same_digest(loaded):
    module, files = loaded
    again, same = load(files.folder)
    with torch.no_grad():
        again(torch.tensor([[5, 6, 7]]))
    assert digest(module, files) == digest(again, same)


@linux
def test_a_place_is_where_the_header_of_the_file_says(original):
    module, files = load(original)
    content = (original / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    found = places(module, files)
    assert found == {name: f"{FILE}+{8 + length + header[name]['data_offsets'][0]}" for name in found}


@linux
def test_untouched_weights_are_not_read(original, monkeypatch):
    module, files = load(original)
    read = []
    monkeypatch.setattr(_weights, "_add_bits", lambda _, tensor: read.append(tuple(tensor.shape)))
    digest(module, files)
    assert read == [tuple(buffer.shape) for buffer in module.buffers()]


@linux
def test_only_what_was_written_loses_its_place(original):
    module, files = load(original)
    before = places(module, files)
    module.get_parameter(WEIGHT).data[0, 0] = 1
    after = places(module, files)
    assert after[WEIGHT] == ""
    assert after["model.embed_tokens.weight"] == before["model.embed_tokens.weight"] != ""


@linux
@pytest.mark.parametrize("how", ["replaced", "deleted", "emptied"])
def test_weights_of_a_file_that_is_gone_are_read(how, original, tmp_path):
    module, files = load(shutil.copytree(original, tmp_path / "model"))
    file, copy = files.folder / FILE, tmp_path / "copy"
    numbers = digest_of_weights(tensors_of(module), checkpoint_of("", {}))
    assert digest(module, files) != numbers
    if how == "replaced":
        shutil.copy2(file, copy)
        copy.rename(file)
    elif how == "deleted":
        file.unlink()
    else:
        kept = file.rename(tmp_path / "kept")
        file.write_bytes(b"")
        assert kept.stat().st_size
    assert places(module, files) == dict.fromkeys(dict(module.named_parameters()), "")
    assert digest(module, files) == numbers


@linux
@pytest.mark.parametrize("entry", [0, -1 << 63, -1 << 63 | 1 << 61, 1 << 62])
def test_a_page_table_that_does_not_tell_is_not_believed(entry, original, monkeypatch):
    """One that always says: not in memory; in memory; the file's; in swap."""
    module, files = load(original)
    monkeypatch.setattr(_mapped, "_entries", lambda table, address, pages: torch.full((pages,), entry))
    assert not any(places(module, files).values())
