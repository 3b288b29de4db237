"""An adapter for lm-eval, EleutherAI's harness, as a command with its arguments.

    python benchmarks/lm_eval_harness.py --model=sftjax --model_args=pretrained=DIR --tasks=arc_easy

model_args: pretrained, a Hugging Face directory or an export; dtype (float32), max_length (what the
model has), add_bos_token (as the tokenizer). The log-likelihoods are those of its backend `hf`.
"""

from collections.abc import Sequence
from typing import Any

import jax

from sftjax import config as config_lib
from sftjax import parallel, tasks
from sftjax.data.masking import question
from sftjax.errors import ConfigError
from sftjax.evaluation import generation
from sftjax.evaluation.likelihood import log_likelihoods
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.training import build

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    raise ConfigError("lm-eval is not installed: pip install 'sftjax[lm-eval]'") from None


@register_model("sftjax")
class SftjaxLM(TemplateLM):
    """A decoder of ours as lm-eval asks it; on all devices that there are."""

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        batch_size: int | str = 64,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """max_batch_size, device: what lm-eval passes to every backend; JAX has its own devices."""
        super().__init__()
        config = config_lib.get_default()
        config.model.path, config.model.dtype = pretrained, dtype
        self.tokenizer: Any = load_tokenizer(config)
        self.model: Any  # of a causal language model: a decoder
        self.model, trainable = build.make_model(config, tasks.make(config, self.tokenizer))
        self.mesh = parallel.make_mesh({"fsdp": -1})
        with jax.set_mesh(self.mesh):
            self.params, _ = build.make_params(config.model, self.model, trainable, self.mesh)
        self.add_bos_token = add_bos_token
        self.max_length = int(max_length or self.model.config.max_positions)
        self.model.check_length(self.max_length, f"max_length={self.max_length}")
        size = 64 if str(batch_size).startswith("auto") else int(batch_size)
        self.options: dict[str, Any] = dict(batch_size=size, mesh=self.mesh)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Of lm-eval's cache."""
        return self.tokenizer.name_or_path

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, as the tokenizer's template writes it."""
        ends = dict(continue_final_message=not add_generation_prompt, tokenize=False)
        ends["add_generation_prompt"] = add_generation_prompt
        return self.tokenizer.apply_chat_template(chat_history, **ends)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; without a second bos where it begins with one."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if string.startswith(self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: Sequence, **kwargs: Any) -> list[tuple[float, bool]]:
        """requests: (what is cached, context ids, continuation ids); cut at the left."""
        pairs = []
        for _, context, rest in requests:
            whole = [*context, *rest][-(self.max_length + 1) :]
            if len(rest) >= len(whole):
                raise ConfigError(f"max_length={self.max_length}: {len(rest)} tokens go on a text")
            pairs.append((whole[: len(whole) - len(rest)], rest))
        with jax.set_mesh(self.mesh):
            sums, greedy = log_likelihoods(self.model, self.params, pairs, **self.options)
        found = list(zip(sums.tolist(), greedy.tolist(), strict=True))
        for (asked, *_), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", asked, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of max_length that do not overlap."""
        out = []
        for (text,) in (request.args for request in requests):
            ids, first = self.tok_encode(text), self.prefix_token_id
            windows = utils.get_rolling_token_windows(ids, first, self.max_length, 1)
            parts = [(text, *utils.make_disjoint_window(window)) for window in windows]
            out.append(sum(x for x, _ in self._loglikelihood_tokens(parts)))
        return out

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of each request's `until`."""
        out = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # of equal settings: they are answered together
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for rows in groups.values():
            asked = requests[rows[0]].args[1]
            new, until = int(asked.get("max_gen_toks", 256)), asked.get("until") or []
            if new >= self.max_length:
                raise ConfigError(f"max_length={self.max_length}: {new} new tokens leave no room")
            prompts = [self.tok_encode(requests[i].args[0]) for i in rows]
            prompts = [ids[-(self.max_length - new) :] for ids in prompts]
            how: dict[str, Any] = dict(max_new_tokens=new, top_k=int(asked.get("top_k", 0)))
            how |= dict(top_p=float(asked.get("top_p", 1)), **self.options)
            how["stop_ids"] = question.stop_ids(self.tokenizer)
            how["temperature"] = float(asked.get("temperature", 1)) * asked.get("do_sample", False)
            with jax.set_mesh(self.mesh):
                answers = generation.generate(self.model, self.params, prompts, **how)
            for i, ids in zip(rows, answers, strict=True):
                out[i] = self.tokenizer.decode(ids, skip_special_tokens=True)
                for stop in [until] if isinstance(until, str) else until:
                    out[i] = out[i].split(stop)[0] if stop else out[i]
        return out


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
