"""Settings of a search that make no sense."""

from __future__ import annotations

from searcher.plan import PRESETS
from tests.bad_input.bad import LAUNCH, Bad, usage

SETTINGS = {
    "preset": Bad(f"{LAUNCH} --preset huge", f"The preset is one of {', '.join(PRESETS)}, not 'huge'"),
    "mutation": Bad(f"{LAUNCH} --mutation wild", "The mutation is one of neighbours, range, lognormal, not 'wild'"),
    "windows without a set": Bad(f"{LAUNCH} --windows 3", "--windows takes a number by set, such as search=1"),
    "windows of an unknown set": Bad(f"{LAUNCH} --windows train=3", "not 'train=3'"),
    "no windows": Bad(f"{LAUNCH} --windows search=0", "not 'search=0'"),
    "a digit that is no number": Bad(f"{LAUNCH} --windows search=²", "not 'search=²'"),
    "no windows to refine on in words": Bad(f"{LAUNCH} --windows refine=x", "not 'refine=x'"),
    "negative windows to refine on": Bad(f"{LAUNCH} --windows refine=-1", "not 'refine=-1'"),
    "n_hat in words": Bad(f"{LAUNCH} --n-hats none", "n_hat choices are whole numbers with commas between"),
    "no n_hat": Bad(f"{LAUNCH} --n-hats ''", "such as 0,4,16, not ''"),
    "negative n_hat": Bad(f"{LAUNCH} --n-hats=-1,0", "not negative"),
    "n_hat beyond the target": Bad(
        f"{LAUNCH} --n-hats 0,99999999999999999999", "n_hat counts start tokens of the target's 256"
    ),
    "negative population": Bad(f"{LAUNCH} --population=-1", "needs at least 1 in population, not -1"),
    "no parents": Bad(f"{LAUNCH} --parents 0", "needs at least 1 in parents, not 0"),
    "negative mutants": Bad(f"{LAUNCH} --mutants=-1", "The number of mutants cannot be negative"),
    "negative generations": Bad(f"{LAUNCH} --generations=-1", "The number of generations cannot be negative"),
    "probability 2": Bad(f"{LAUNCH} --mutation-probability 2", "The mutation probability lies in (0, 1], not at 2.0"),
    "probability NaN": Bad(f"{LAUNCH} --mutation-probability nan", "not at nan"),
    "upper ratio 0": Bad(f"{LAUNCH} --upper-ratio 0", "a positive number of times the scale, not 0.0"),
    "upper ratio below every factor": Bad(
        f"{LAUNCH} --upper-ratio 0.1", "must satisfy 0 < lower <= upper, not 1.0 and 0.4"
    ),
    "infinite upper ratio": Bad(f"{LAUNCH} --upper-ratio inf", "a positive number of times the scale, not inf"),
    "upper ratio NaN": Bad(f"{LAUNCH} --upper-ratio nan", "a positive number of times the scale, not nan"),
    "attention factor": Bad(
        f"{LAUNCH} --attention-factor big", "one of su, yarn, none or a positive number, not 'big'"
    ),
    "attention factor 0": Bad(f"{LAUNCH} --attention-factor 0", "positive number, not '0'"),
    "dtype": Bad(f"{LAUNCH} --dtype int8", "The dtype is auto, float32, bfloat16, float16, not 'int8'"),
    "attention kernel": Bad(f"{LAUNCH} --attention fast", "The attention kernel is one of auto, longrope, sdpa, eager"),
    "sliding window": Bad(f"{LAUNCH} --sliding-window wide", "--sliding-window takes keep, off or a number of tokens"),
    "output folder missing": Bad(f"{LAUNCH} --out nowhere", "--out must be a folder that exists; nowhere is none"),
    "threads 0": usage(f"{LAUNCH} --threads 0", "--threads"),
    "workers 0": usage(f"{LAUNCH} --workers 0", "--workers"),
    "negative GPUs": usage(f"{LAUNCH} --gpus-per-worker=-1", "--gpus-per-worker"),
    "negative seed": usage(f"{LAUNCH} --seed=-1", "--seed"),
    "a seed that no file holds": usage(f"{LAUNCH} --seed {10**40}", "--seed"),
    "no documents": usage(f"{LAUNCH} --search-documents 0", "--search-documents"),
    "no finalists": usage(f"{LAUNCH} --finalists 0", "--finalists"),
    "no windows to evaluate": usage("evaluate --model {model} --data {text} --windows 0", "--windows"),
    "a flag in words": usage("evaluate --model {model} --data {text} --threads many", "--threads"),
    "an option that is none": Bad(f"{LAUNCH} --modell x", "No such option: --modell", 2),
    "a command that is none": Bad("start", "No such command 'start'", 2),
    "no study named": Bad("resume", "Missing argument", 2),
}

REFINEMENT = {
    "no steps": Bad(f"{LAUNCH} --refine-steps 0", "A refinement needs at least 1 in steps, not 0"),
    "negative steps": Bad(f"{LAUNCH} --refine-steps=-5", "at least 1 in steps, not -5"),
    "negative legs": Bad(f"{LAUNCH} --refine-legs=-1", "at least 0 in legs, not -1"),
    "negative final legs": Bad(f"{LAUNCH} --refine-final-legs=-1", "at least 0 in final_legs, not -1"),
    "no starts": Bad(f"{LAUNCH} --refine-starts 0", "at least 1 in starts, not 0"),
    "rate 0": Bad(f"{LAUNCH} --refine-rate 0", "The rate of a refinement is a positive number, not 0.0"),
    "negative rate": Bad(f"{LAUNCH} --refine-rate=-0.1", "a positive number, not -0.1"),
    "infinite rate": Bad(f"{LAUNCH} --refine-rate inf", "a positive number, not inf"),
    "rate NaN": Bad(f"{LAUNCH} --refine-rate nan", "a positive number, not nan"),
    "half a leg": usage(f"{LAUNCH} --refine-legs 0.5", "--refine-legs"),
    "steps in words": usage(f"{LAUNCH} --refine-steps many", "--refine-steps"),
    "nothing that learns the attention factor": Bad(
        f"{LAUNCH} --learn-attention --refine-legs 0 --refine-final-legs 0",
        "are of a refinement, and this search has none; give it legs (--refine-legs)",
    ),
    "a start of the attention factor": Bad(f"{LAUNCH} --learn-attention --attention-factor=-1", "positive number"),
}

SEARCHES = {
    "sampler": Bad(
        f"{LAUNCH} --sampler annealing", "The sampler is one of random, random-log, cmaes, tpe, nsga2, not 'annealing'"
    ),
    "empty sampler": Bad(f"{LAUNCH} --sampler ''", "The sampler is one of random"),
    "a sampler that is refined first": Bad(
        f"{LAUNCH} --sampler tpe --refine-legs 1",
        "set its legs to 0 (--refine-legs 0), and final_legs (--refine-final-legs) for the end",
    ),
    "a sampler that learns without an end": Bad(
        f"{LAUNCH} --sampler tpe --learn-attention --refine-final-legs 0",
        "with a sampler final_legs (--refine-final-legs)",
    ),
    "CMA-ES one by one": Bad(
        f"{LAUNCH} --sampler cmaes --mutants 1 --crosses 0", "The sampler cmaes needs at least 2 in batch, not 1"
    ),
    "NSGA-II one by one": Bad(
        f"{LAUNCH} --sampler nsga2 --mutants 1 --crosses 0", "The sampler nsga2 needs at least 3 in batch, not 1"
    ),
    "random search of nobody": Bad(
        f"{LAUNCH} --sampler random --mutants 0 --crosses 0", "The sampler random needs at least 1 in batch, not 0"
    ),
    "a sampler without end": Bad(f"{LAUNCH} --sampler tpe --generations 100000000", "more than 10000000 individuals"),
    "racing caution NaN": Bad(
        f"{LAUNCH} --racing-caution nan", "The caution of racing is a number of deviations, at least 0, not nan"
    ),
    "racing caution without racing": Bad(
        f"{LAUNCH} --no-racing", "--racing-caution is of racing, which --no-racing leaves out; give one of them"
    ),
    "negative racing caution": Bad(f"{LAUNCH} --racing-caution=-1", "at least 0, not -1.0"),
    "infinite racing caution": Bad(f"{LAUNCH} --racing-caution inf", "at least 0, not inf"),
    "racing in words": Bad(f"{LAUNCH} --racing=yes", "does not take a value", 2),
    "critical pair beyond the last": Bad(
        f"{LAUNCH} --critical-pair 8",
        "The critical pair is auto (3 for this model) or a whole number from 0 to 7, not '8'",
    ),
    "negative critical pair": Bad(f"{LAUNCH} --critical-pair=-1", "a whole number from 0 to 7, not '-1'"),
    "critical pair in words": Bad(f"{LAUNCH} --critical-pair first", "from 0 to 7, not 'first'"),
    "half a critical pair": Bad(f"{LAUNCH} --critical-pair 2.5", "from 0 to 7, not '2.5'"),
    "an upper bound below the critical pair's lower": Bad(
        f"{LAUNCH} --critical-pair 2 --upper-ratio 0.5", "must satisfy 0 < lower <= upper, not 4.0 and 2.0"
    ),
    "negative needles": usage(f"{LAUNCH} --needles=-1", "--needles"),
    "more needles than the window holds": Bad(
        f"{LAUNCH} --needles 50", "A window of 256 tokens has no room for needles and questions, 50 of each"
    ),
}

MEMORY = {
    "chunk 0": usage(f"{LAUNCH} --chunk 0", "--chunk"),
    "chunk in words": usage(f"{LAUNCH} --chunk all", "--chunk"),
    "chunk of a kernel that runs whole": Bad(
        f"{LAUNCH} --attention sdpa --chunk 64", "With sdpa attention the model runs whole, so chunk does not apply"
    ),
    "hidden states of a kernel that runs whole": Bad(
        f"{LAUNCH} --attention eager --hidden-on-host", "so hidden_on_host does not apply; leave it out"
    ),
    "weights of a kernel that runs whole": Bad(
        f"{LAUNCH} --attention eager --stream-weights", "so stream_weights does not apply; leave it out"
    ),
    "evaluate in chunks of 0": usage("evaluate --model {model} --data {text} --chunk 0", "--chunk"),
    "evaluate, a kernel that runs whole": Bad(
        "evaluate --in-process --model {model} --data {text} --lengths 1x --attention sdpa --stream-weights",
        "so stream_weights does not apply",
    ),
}
