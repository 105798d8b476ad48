"""What tests of several rooms share: the command in this process, an editor of a tiny model, a patch."""

from __future__ import annotations

import contextlib
import io
import os
from types import SimpleNamespace

import torch
from tiny_models import TEXT, make_model, make_tokenizer

from benchmarks.published import serial_value
from kedit_fast import Editor, EditRequest, LowRankUpdate, collect_statistics
from kedit_fast.cli import main
from kedit_fast.methods.presets import make_hparams
from kedit_fast.models.view import ModelView
from kedit_fast.patches.patch import Patch, Target
from kedit_fast.requests.prompts import prepare
from kedit_fast.support.matrix_bits import sha256

PREFIXES = ("The old tower. ", "Because I saw. ")

REQUESTS = [
    EditRequest("{} plays the", "Miles Davis", "violin"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English"),
    EditRequest("{} is located in", "Autonomous University of Madrid", "Sweden"),
]

NUMBERS = dict(v_num_grad_steps=6, v_lr=0.1, clamp_norm_factor=0.5, v_weight_decay=0.5, mom2_ridge=1e-3)
VARIED_REQUESTS = [
    EditRequest("{} plays the", "Miles Davis", "violin and cello"),  # first, several target tokens
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English"),  # in the middle
    EditRequest("Because you saw {}", "Ebro", "Spain"),  # last, one or two tokens
    EditRequest("Ebro, and {} is located in", "Ebro", "Sweden, nobody"),  # occurs twice
    EditRequest("{}", "Autonomous University of Madrid", "French"),  # nothing but the subject
]


def run(*args, cwd=None, **environment):
    """The command in this process: (returncode, stdout, stderr), as a shell would see them."""
    out, err, before, here = io.StringIO(), io.StringIO(), dict(os.environ), os.getcwd()
    os.environ.update({"HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment})
    os.chdir(cwd or here)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main.app([str(a) for a in args], prog_name="kedit-fast")
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def saved(folder, kind, **options):
    make_model(kind, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_editor(kind="llama", method="memit", dtype=torch.float32, **hparams):
    tokenizer, model = make_tokenizer(), make_model(kind, dtype)
    layers = hparams.pop("layers", (0, 1) if method == "memit" else (1,))
    statistics = collect_statistics(model, tokenizer, TEXT * 2, (0, 1), progress=False)
    numbers = {
        **NUMBERS,
        **({"mom2_update_weight": 10.0} if method == "memit" else {"mom2_adjustment": True}),
        **hparams,
    }
    return Editor(model, tokenizer, method, statistics=statistics, layers=layers, hparams=numbers, prefixes=PREFIXES)


def weights(editor):
    return {name: tensor.clone() for name, tensor in editor.view.model.state_dict().items()}


def same(editor, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in editor.view.model.state_dict().items())


def prepared_and_hparams(model, tokenizer, site, layer, **values):
    numbers = dict(layers=(layer,), v_num_grad_steps=7, v_lr=0.1, clamp_norm_factor=0.5, v_weight_decay=0.5) | values
    hparams, _ = make_hparams("memit" if site == "block" else "rome", model.config, numbers)
    return prepare(tokenizer, VARIED_REQUESTS, PREFIXES, 128), hparams


def serial_errors(values, prepared, model, module, hparams):
    """|value - that of the serial loop| / |delta| of each request, whose steps and loss must be those of the loop."""
    errors = []
    for i, request in enumerate(prepared):
        alone = serial_value(model, [module], request, hparams, side=None)
        assert int(values.steps[i]) == alone.steps
        assert abs(float(values.losses[i]) - alone.loss) < 1e-3 * max(1.0, alone.loss)
        errors.append(float((values.targets[:, i] - alone.targets[0]).norm() / values.deltas[:, i].norm()))
    return errors


def random_patch(model, rank=3, scale=0.05, seed=1, layers=(0, 1)):
    """Of all edited modules of a model, without an edit."""
    view, generator = ModelView(model), torch.Generator().manual_seed(seed)
    updates, targets = {}, {}
    for layer in layers:
        weight, name = view.weight(layer), view.module_name(layer)
        left, right = (scale * torch.randn(n, rank, generator=generator) for n in weight.shape)
        updates[name] = LowRankUpdate(left, right)
        dtype = str(weight.dtype).removeprefix("torch.")
        targets[name] = Target(sha256(weight), "", dtype, view.spec.transposed)
    return Patch(updates, targets, "test")
