"""Stand-ins of the code of EasyEdit, memit and AlphaEdit that calls us, written from its documented behavior."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from support import NUMBERS

from kedit_fast import NullSpace

COMMON = dict(
    NUMBERS, layers=[0, 1], v_loss_layer=3, v_weight_decay=0.5, kl_factor=0.0625, mom2_adjustment=True,
    mom2_update_weight=10, layer_selection="all", fact_token="subject_last",
    rewrite_module_tmp="model.layers.{}.mlp.down_proj", layer_module_tmp="model.layers.{}",
    mlp_module_tmp="model.layers.{}.mlp", attn_module_tmp="model.layers.{}.self_attn", ln_f_module="model.norm",
    lm_head_module="lm_head", mom2_dataset="wikipedia", mom2_n_samples=100, mom2_dtype="float32", stats_dir="nowhere",
    model_name="./hugging_cache/tiny", device=0, model_parallel=False, context_template_length_params=[[3, 2]],
)  # fmt: skip
OWN = {  # of the methods
    "ROME": dict(layers=[1], mom2_adjustment=False),
    "R-ROME": dict(layers=[1], mom2_adjustment=False),
    "MEMIT": {},
    "PMET": dict(nll_loss_factor=1, rewrite_module_tmps=["model.layers.{}.mlp.down_proj"]),
    "EMMET": dict(update_norm_lambda=0, emmet_lambda=0.1),
    "AlphaEdit": dict(P_loc="./nowhere.pt", L2=1, nullspace_threshold="2e-1", nullspace_rule="energy", batch_size=1),
    "ULTRAEDIT": dict(inner_params=["model.layers.1.mlp.down_proj"], lr=1e-3, token="mask", batch_size=2,
                      batch_size_once=1, dropout=0.0, no_grad_layers=None, editor_batch_size=10, silent=False,
                      half=False, results_dir="./results", model_class="AutoModelForCausalLM"),
    "MEMIT-Seq": {}, "MEMIT-Merge": {}, "ENCORE": dict(update_norm_lambda=10), "RECT": {}, "PRUNE": {},
    "FT": dict(layers=[1], num_steps=4, lr="1e-2", weight_decay=0, kl_factor=0, norm_constraint=False,
               objective_optimization="target_new", rewrite_module_tmp="model.layers.{}.mlp.down_proj.weight"),
    "DINM": dict(layers=[], num_steps=2, lr="5e-3", weight_decay=0, kl_factor=0.1, norm_constraint=False,
                 suffix_system_prompt="Be kind:", max_output_length=600,
                 rewrite_module_tmp="model.layers.{}.mlp.down_proj.weight"),
    "WISE": dict(inner_params=["model.layers[4].mlp.down_proj.weight"], edit_lr=1.0, n_iter=12, mask_ratio=0.2,
                 norm_constraint=1, act_margin=[5.0, 20.0, 10.0], act_ratio=0.88, save_freq=500, merge_freq=1000,
                 merge_alg="ties", objective_optimization="only_label", densities=0.53, weights=1.0, retrieve=True,
                 replay=False),
    "GRACE": dict(inner_params=["model.layers[4].mlp.down_proj.weight"], edit_lr=1.0, n_iter=12, eps=1.0, dist_fn="euc",
                  val_init="cold", val_train="sgd", val_reg="None", reg="early_stop", replacement="replace_last",
                  eps_expand="coverage", num_pert=8, dropout=0.0),
}  # fmt: skip
BESIDE = ("WISE", "GRACE")
"""Methods whose function returns an object that answers, and a function that undoes; their files are for the demo
model, which learns more than a random one."""
CLOSED_FORMS = tuple(name for name in OWN if name not in ("FT", "DINM", *BESIDE))
"""Methods whose functions have EasyEdit's common signature."""
WHOLE_FILES = ("ULTRAEDIT", "FT", "DINM", *BESIDE)
"""Methods whose files have none of `COMMON`."""


def hparams_of(name, **more):
    """An object like those of EasyEdit's classes: the names of its yaml as attributes."""
    place = {"model_name": "./hugging_cache/tiny", "device": 0, "batch_size": 1, "max_length": 40}
    common = {} if name == "ULTRAEDIT" else place if name in WHOLE_FILES else COMMON
    values = {**common, **OWN[name], "alg_name": name, **more}
    return SimpleNamespace(**values)


def asked(request, number=0):
    """As EasyEdit's _prepare_requests makes them: the subject stands in the prompt, the target is a text."""
    return {"prompt": request.text, "subject": request.subject, "target_new": request.target_new,
            "ground_truth": None, "portability": {}, "locality": {}, "case_id": number}  # fmt: skip


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def null_spaces(statistics):
    return {
        layer: NullSpace.from_covariance(second.moment, 0.2, "energy", 1.0)
        for layer, second in statistics.layers.items()
    }


def alpha_hparams(**more):
    values = {k: v for k, v in vars(hparams_of("AlphaEdit")).items() if k not in ("device", "stats_dir", "P_loc")}
    return {**values, **more}


def easyedit_name(name):
    return {"MEMIT-Seq": "memit-sequential", "FT": "ft-m"}.get(name, name.lower())


class BaseEditor:
    """What EasyEdit's editor does around an algorithm: edit one request, look, restore from the copies, or do not."""

    def __init__(self, table, hparams, model, tok):
        self.apply_algo, self.hparams, self.model, self.tok = table[hparams.alg_name], hparams, model, tok

    def edit(self, requests, sequential_edit=False, **kwargs):
        seen = []
        for request in requests:
            edited, weights_copy = self.apply_algo(
                self.model, self.tok, [request], self.hparams, copy=False, return_orig_weights=True,
                keep_original_weight=False, train_ds=None, **kwargs,
            )  # fmt: skip
            if callable(weights_copy):
                seen.append(self.answer(edited, request))
                if not sequential_edit:
                    weights_copy()
                continue
            seen.append({name: edited.get_parameter(name).detach().clone() for name in weights_copy})
            if not sequential_edit:
                with torch.no_grad():
                    for name, value in weights_copy.items():
                        self.model.get_parameter(name)[...] = value
        return seen

    def answer(self, edited, request):
        """Greedy tokens behind a prompt, as EasyEdit's evaluation of GRACE asks for them."""
        prompt = self.tok(request["prompt"], return_tensors="pt")
        return edited.generate(
            input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=2, do_sample=False,
            pad_token_id=self.tok.eos_token_id, use_cache=False,
        )  # fmt: skip
