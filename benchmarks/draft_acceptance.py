"""How many tokens of a sparse draft the dense model accepts: the embedded model, on books it has not seen.

python benchmarks/draft_acceptance.py
"""

import torch
from environment import describe

import was_fx
from was_fx import embedded
from was_fx.sparse.drafting import acceptance

TARGETS = (0.25, 0.4, 0.5, 0.6, 0.75)
GUESSES = (3, 5, 8)
PROMPTS, PROMPT, NEW = 8, 32, 64


def main() -> None:
    print(describe())
    model, _ = embedded.load(torch.float32)
    calibration = was_fx.calibrate(model, embedded.tokens("calibration", 512))
    spaced = embedded.tokens("test", PROMPT)
    prompts = spaced[:: len(spaced) // PROMPTS][:PROMPTS]
    print(f"{PROMPTS} prompts of {PROMPT} tokens, {NEW} new tokens each, greedy; WAS score, uniform")
    print(
        "| sparsity of the draft | guesses | tokens per dense step | accepted per step | accepted share | same text |"
    )
    print("|---|---|---|---|---|---|")
    for target in TARGETS:
        for guesses in GUESSES:
            schedule = was_fx.uniform(calibration, target)
            draft = was_fx.draft(model, schedule, tokens=guesses)
            found = acceptance(model, draft, prompts, max_new_tokens=NEW)
            print(
                f"| {100 * target:.0f} % | {guesses} | {found.tokens_per_step:.2f} | {found.accepted_per_step:.2f} "
                f"| {100 * found.accepted_share:.0f} % | {'yes' if found.equal else 'no'} |",
                flush=True,
            )
            was_fx.densify(draft)


if __name__ == "__main__":
    main()
