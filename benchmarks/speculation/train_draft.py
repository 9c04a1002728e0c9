#!/usr/bin/env python3
"""Train drafts of SmolLM2-135M on a CPU: a model of a few of its own layers, an EAGLE-3 head, an EAGLE head.

    pip install transformers accelerate
    PYTHONPATH=src python benchmarks/speculation/train_draft.py OUT [--only layers eagle3] [--minutes 10]

Each learns, by the distributions of the target, what SmolLM2 itself says to some hundreds of prompts, for so many
minutes. Saves the folders OUT/layers (an ordinary Llama), OUT/eagle3 and OUT/eagle (in the published layouts), and
prints one JSON row each: of greedy answers to prompts about other topics, the tokens that a chain of 3, and of 5, has
right in a step, on average. SmolLM2's answers are kept in OUT/texts.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from draft_data import Text, Tokens, frequent_ids, generate, load_target, read
from draft_heads import CONFIDENCE, Eagle3Head, EagleHead, Head
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from octavo.loading.package import pull

DRAFT_VOCAB_SIZE = 8192
KINDS = ("layers", "eagle3", "eagle")
BATCH_TEXTS = 4
CHAIN = 5  # tokens that are measured
TRAINED_CHAIN = 2  # steps of a chain that a head is trained on
STEP_WEIGHT = 0.8  # of each further step of a chain in the loss, as in EAGLE-3
LEARNING_RATE = 1e-3
Loss = Callable[[Text], Tensor]
Matches = Callable[[Text], Tensor]


def train(parameters: list[Tensor], loss: Loss, texts: list[Text], minutes: float) -> tuple[float, int]:
    """Train for so many minutes of processor time. Returns the mean loss of the last steps, and how many there were."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0)
    order, rng, losses = [], random.Random(0), []
    began = time.process_time()
    while (share := (time.process_time() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (len(losses) + 1) / 10) * (1 - share)
        total = 0.0
        for _ in range(BATCH_TEXTS):
            if not order:
                order = list(range(len(texts)))
                rng.shuffle(order)
            each = loss(texts[order.pop()]) / BATCH_TEXTS
            each.backward()
            total += float(each.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if len(losses) % 20 == 0:
            print(f"step {len(losses)}, {100 * share:.0f} %: loss {sum(losses[-20:]) / 20:.3f}", flush=True)
    last = losses[-20:]
    return sum(last) / len(last), len(losses)


def imitation(logits: Tensor, hidden: Tensor, table: Tensor) -> Tensor:
    """Cross-entropy against the target's distribution over the rows of `table`, from its last hidden states."""
    wanted = (hidden.to(table.dtype) @ table.T).float().softmax(-1)
    return F.cross_entropy(logits.float(), wanted)


class LayersDraft:
    """A Llama of some of the target's layers, with its embedding, norm and language head."""

    def __init__(self, target: Any, layers: list[int], draft_ids: Tensor) -> None:
        self.model = copy.deepcopy(target)
        self.model.model.layers = torch.nn.ModuleList(self.model.model.layers[i] for i in layers)
        for index, layer in enumerate(self.model.model.layers):
            layer.self_attn.layer_idx = index
        self.model.config.num_hidden_layers = len(layers)
        self.model.model.norm.weight.data.mul_(CONFIDENCE)
        # Frozen, the table keeps the tokens apart that training does not see.
        self.parameters = [*self.model.model.layers.parameters(), *self.model.model.norm.parameters()]
        self._table = target.model.embed_tokens.weight[draft_ids]
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def loss(self, text: Text) -> Tensor:
        first = text.num_prompt_tokens - 1
        hidden = self.model.model(text.ids[None, :-1]).last_hidden_state[0, first:]
        return imitation(hidden @ self._table.T, text.hidden[first:-1], self._table)

    def matches(self, text: Text) -> Tensor:
        """As HeadDraft.matches: while its drafts are right, a draft model has read the text itself."""
        first = text.num_prompt_tokens
        right = self.model(text.ids[None, :-1]).logits[0, first:].argmax(-1) == text.ids[first + 1 :]
        padded = F.pad(right, (0, CHAIN - 1))
        return torch.stack([padded[step : step + len(right)] for step in range(CHAIN)])

    def save(self, folder: Path) -> None:
        path = pull("smollm2")
        self.model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


class HeadDraft:
    """An EAGLE or EAGLE-3 head."""

    def __init__(self, target: Any, head: Head, draft_ids: Tensor, taps: tuple[int, ...]) -> None:
        self._head, self._ids, self._taps = head, draft_ids, taps
        self._config = target.config
        self._table = target.model.embed_tokens.weight[draft_ids]
        self.parameters = list(head.parameters())

    def _states(self, text: Text) -> Tensor:
        return (text.taps if self._taps else text.hidden).float()

    def loss(self, text: Text) -> Tensor:
        total = torch.zeros(())
        first, chain = text.num_prompt_tokens - 2, self._head.begin(self._states(text)[: -TRAINED_CHAIN - 1])
        num_anchors = len(chain.features)
        for step in range(TRAINED_CHAIN):
            features, chain = self._head.step(text.ids[1 + step : 1 + step + num_anchors], chain)
            hidden = text.hidden[1 + step : 1 + step + num_anchors][first:]
            each = imitation(self._head.logits(features[first:]), hidden, self._table)
            if not self._taps:  # EAGLE's own loss: the features are to be the target's
                each = each + F.smooth_l1_loss(features[first:].float(), hidden.float())
            total = total + STEP_WEIGHT**step * each
        return total

    def matches(self, text: Text) -> Tensor:
        """Whether step s of the chain that begins at an anchor has the text's token, [CHAIN, anchors]. The first anchor
        is the prompt's last token: with it, the target gives the first output token itself."""
        first, ids = text.num_prompt_tokens - 1, text.ids
        chain = self._head.begin(self._states(text)[:-2])
        num_anchors = len(chain.features)
        padded = F.pad(ids, (0, CHAIN), value=-1)
        right = []
        for step in range(CHAIN):
            read = padded[1 + step : 1 + step + num_anchors].clamp(min=0)
            features, chain = self._head.step(read, chain)
            right.append((self._head.draft(features) == padded[2 + step : 2 + step + num_anchors])[first:])
        return torch.stack(right)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in self._head.state_dict().items()}
        config = self._config.to_dict() | {"num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"]}
        if self._taps:
            taken = torch.zeros(self._config.vocab_size, dtype=torch.bool)
            taken[self._ids] = True
            tensors |= {"d2t": self._ids - torch.arange(len(self._ids)), "t2d": taken}
            config |= {"draft_vocab_size": len(self._ids), "architectures": ["LlamaForCausalLMEagle3"]}
            config["eagle_aux_hidden_state_layer_ids"] = list(self._taps)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2))


@torch.no_grad()
def accepted_per_step(matches: Matches, texts: list[Text], length: int) -> float:
    """Drafts of a chain of this length that a greedy target takes in a step, on average, along the texts."""
    accepted = num_steps = 0
    for text in texts:
        right = matches(text)[:length].int()
        runs = right.cumprod(0).sum(0).tolist()
        at = 0
        while at + length <= len(runs):
            accepted += runs[at]
            at += runs[at] + 1
            num_steps += 1
    return accepted / num_steps


def texts_of(path: Path, num_prompts: int) -> tuple[list[Tokens], list[Tokens]]:
    """Training and held-out texts, kept in a file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(generate(num_prompts)))
    training, held_out = json.loads(path.read_text())
    return [(ids, n) for ids, n in training if len(ids) - n > CHAIN], [(ids, n) for ids, n in held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--minutes", type=float, default=10.0, help="of processor time to train, for each")
    parser.add_argument("--prompts", type=int, default=700)
    parser.add_argument("--layers", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="of the target, for the model")
    args = parser.parse_args()
    training, held_out = texts_of(args.out / "texts.json", args.prompts)
    target = load_target()
    num_layers = target.config.num_hidden_layers
    taps = (2, num_layers // 2, num_layers - 3)
    ids = frequent_ids(training, DRAFT_VOCAB_SIZE)
    texts, others = read(target, training, taps), read(target, held_out, taps)
    for kind in args.only:
        torch.manual_seed(0)
        if kind == "layers":
            draft: LayersDraft | HeadDraft = LayersDraft(target, args.layers, ids)
        elif kind == "eagle3":
            draft = HeadDraft(target, Eagle3Head(target, ids, len(taps)), ids, taps)
        else:
            draft = HeadDraft(target, EagleHead(target, ids), ids, ())
        loss, num_steps = train(draft.parameters, draft.loss, texts, args.minutes)
        means = {f"accepted_of_{n}": round(accepted_per_step(draft.matches, others, n), 3) for n in (3, CHAIN)}
        draft.save(args.out / kind)
        print(json.dumps({"draft": kind, "steps": num_steps, "loss": round(loss, 4)} | means), flush=True)


if __name__ == "__main__":
    main()
