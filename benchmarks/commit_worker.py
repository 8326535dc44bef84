"""A process of `compare_commits.py`: one model, sparsified by the was_fx that PYTHONPATH names.

Reads one JSON object per line from stdin and answers each with one on stdout; all else that is printed goes to stderr.
The first line says what to make; then `{"do": "warm"}`, and `{"do": "time", "target": 0.5}` any number of times. Works
with the was_fx of today and with that of commits whose `sparsify` compiled the model's own call.
"""

import hashlib
import importlib
import inspect
import json
import os
import statistics
import sys
import time

import torch

WARM_UP = 8
CYCLES = 4_000_000  # of the GPU's clock: about 2 ms

# An editable installation would find what this folder's was_fx does not have in its own.
sys.meta_path[:] = [each for each in sys.meta_path if not getattr(each, "__module__", "").startswith("__editable__")]


def imported(*names):
    """The first of these modules that there is."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or "?"):
                raise
    raise ModuleNotFoundError(f"none of {', '.join(names)} in {importlib.import_module('was_fx').__file__}")


class Clock:
    """A streamer that notes when each token arrives."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass


class Subject:
    """The model and what makes its decode steps."""

    def __init__(self, asked):
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device, self.tokens = asked["device"], asked["tokens"]
        torch.manual_seed(0)
        with torch.device(self.device):
            config = AutoConfig.for_model(asked["kind"], **asked["settings"])
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (4, max(asked["prompt"], 128)), generator=generator)
        sequential = imported("was_fx.measure.sequential", "was_fx.sequential")
        self.schedules = {
            target: sequential.uniform_while_dropping(self.model, ids[:, :128], target) for target in asked["targets"]
        }
        self.prompt = ids[:1, : asked["prompt"]].to(self.device)
        self.sparsify = importlib.import_module("was_fx").sparsify
        try:
            step = importlib.import_module("was_fx.generate.compiled_step").CompiledStep
            self.step, self.kind = step(self.model, {}), "a compiled step beside the model"
        except ModuleNotFoundError:
            self.step, self.kind = self.model, "the model's own compiled call"
        names = inspect.signature(type(self.model).forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.cache = None
        self.use(asked["targets"][0])

    def use(self, target):
        self.sparsify(self.model, self.schedules[target])

    def made(self):
        """What the driver compares to see that both processes have the same model."""
        first = next(p for p in self.model.parameters() if p.dim() == 2)
        thresholds = [entry.threshold for each in self.schedules.values() for entry in each.linears.values()]
        return {
            "was_fx": importlib.import_module("was_fx").__file__,
            "step": self.kind,
            "weights": float(first.double().sum()),
            "thresholds": sum(thresholds),
            "torch": torch.__version__,
            "transformers": importlib.import_module("transformers").__version__,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
        }

    def warm(self):
        """Compile and capture everything; the first `generate()` from cold."""
        start = time.perf_counter()
        self.generate(self.tokens)
        first = time.perf_counter() - start
        self.generate(self.tokens)
        before = graphs()
        for cut, new in ((0, 16), (7, 40), (50, 20)):
            self.generate(new, self.prompt[:, min(cut, self.prompt.shape[1] - 1) :])
        recompiled = graphs() - before
        for target in self.schedules:
            self.use(target)
            self.generate(self.tokens)
            self.steps()
        steps = (self.step, getattr(self.model.generate, "step", None))
        declined = {getattr(each, "declined", "") for each in steps} - {""}
        return {"first_generate_s": first, "recompiled": recompiled, "declined": "; ".join(declined)}

    def time(self, target):
        self.use(target)
        step_ms, text = self.steps()
        clock = Clock()
        self.synchronize()
        start = time.perf_counter()
        generated = self.generate(self.tokens, streamer=clock)
        whole = time.perf_counter() - start
        arrived = clock.times[1:]
        token_ms = 1e3 * (arrived[-1] - arrived[WARM_UP]) / (len(arrived) - 1 - WARM_UP)
        digest = hashlib.sha1(str((text.tolist(), generated.tolist())).encode()).hexdigest()[:8]
        return {"step_ms": step_ms, "token_ms": token_ms, "call_ms": 1e3 * whole, "tokens": digest}

    def generate(self, new, prompt=None, streamer=None):
        prompt = self.prompt if prompt is None else prompt
        text = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation="static",
            streamer=streamer,
        )
        self.synchronize()
        return text

    def steps(self):
        """Median milliseconds of a decode step with a static cache, by the GPU's clock, and the new tokens.

        The GPU waits until Python has queued the steps: how long Python takes for one shows in `generate()`.
        """
        from transformers import StaticCache

        if self.cache is None:
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.prompt.shape[1] + self.tokens)
        self.cache.reset()
        arguments = {self.cache_name: self.cache, "use_cache": True, "logits_to_keep": 1}
        logits = self.model(input_ids=self.prompt, **arguments).logits
        position = torch.tensor([[self.prompt.shape[1]]], device=self.device)
        marks, text = [], []
        if self.device == "cuda":
            torch.cuda._sleep(CYCLES * self.tokens)
        for _ in range(self.tokens):
            token = logits[:, -1].argmax(-1, keepdim=True)
            text.append(token)
            marks.append(self.mark())
            logits = self.step(input_ids=token, position_ids=position, **arguments).logits
            position = position + 1
        self.synchronize()
        pairs = zip(marks[WARM_UP:], marks[WARM_UP + 1 :], strict=False)
        return statistics.median(self.between(*pair) for pair in pairs), torch.cat(text, dim=1)

    def mark(self):
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, before, after):
        return before.elapsed_time(after) if self.device == "cuda" else 1e3 * (after - before)

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def graphs():
    """Graphs that Dynamo has compiled so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    subject = None
    for line in sys.stdin:
        asked = json.loads(line)
        if subject is None:
            subject = Subject(asked)
            answer = subject.made()
        elif asked["do"] == "warm":
            answer = subject.warm()
        else:
            answer = subject.time(asked["target"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
