"""Plans that cannot be run, and extensions that cannot begin."""

from __future__ import annotations

from tests.bad_input.bad import EXTEND, Bad, plan, usage

SEARCH = '[[stages]]\nkind = "search"\nlength = "4x"\n'
TUNE = '[[stages]]\nkind = "finetune"\nlength = "4x"\nfactors = "pi"\nsteps = 3\nwarmup = 0\n'
EVALUATE = '[[stages]]\nkind = "evaluate"\nlengths = ["1x", "4x"]\n'
SMALL = "".join(f"{stage}documents = {{ search = 2, selection = 1, test = 2 }}\n" for stage in (SEARCH, TUNE))
COMPARE = '[[stages]]\nkind = "compare"\n'

PLANS = {
    # what is no plan
    "plan, empty": plan("", "A plan needs its stages, one [[stages]] table each"),
    "plan, no TOML": plan("once upon a time", "is not TOML: Expected '=' after a key"),
    "plan, no text": plan("\0", "is not TOML: Invalid statement"),
    "plan, cut off": plan("[[stages", "is not TOML: Expected ']]'"),
    "plan, a key twice": plan(f"{SEARCH}length = '8x'", "is not TOML: Cannot overwrite a value"),
    "plan, nested without end": plan("a = " + "[\n" * 20_000, "is not TOML: maximum recursion depth exceeded"),
    "plan, a key of 100,000 parts": plan("a" + ".a" * 100_000 + " = 1", "at most 64 KiB, and 1000 bytes a line"),
    "plan, 100,000 lines": plan("# more\n" * 100_000, "at most 64 KiB, and 1000 bytes a line"),
    "plan, no list of stages": plan("stages = 3", "A plan needs its stages"),
    "plan, stages that are numbers": plan("stages = [1]", "A plan needs its stages"),
    "plan, an unknown table": plan(f"[tuning]\nsteps = 3\n{SEARCH}", "The plan does not know 'tuning'; it takes name"),
    "plan, defaults that are no table": plan(f"search = 3\n{SEARCH}", "[search] holds what is common to stages of its"),
    "plan, a number for a name": plan(f"name = 3\n{SEARCH}", "The name of a plan is a text of up to 80 characters"),
    "plan, a name that moves the cursor": plan(f'name = "a\\u001b[2Jb"\n{SEARCH}', "not 'a\\x1b[2Jb'"),
    # stages
    "stage without a kind": plan("[[stages]]\nlength = '4x'", "kind of stage 1 is one of search, finetune, recover"),
    "stage of a list's kind": plan("[[stages]]\nkind = ['search']", "compare, not ['search']"),
    "stage without a length": plan(
        "[[stages]]\nkind = 'search'", "stage 1: a length is missing, such as length = 4096"
    ),
    "stage of negative length": plan("[[stages]]\nkind = 'search'\nlength = -4", "stage 1: A length is a whole number"),
    "stage of infinite length": plan("[[stages]]\nkind = 'search'\nlength = 1e400", "at most 2048M, not 'inf'"),
    "stage of a length beyond all": plan("[[stages]]\nkind = 'search'\nlength = '1e300'", "at most 2048M, not '1e300'"),
    "stage within the window": plan("[[stages]]\nkind = 'search'\nlength = '1x'", "within the trained window of 64"),
    "stage that leaves its folder": plan(
        f"{SEARCH}name = '../../up'", "A stage's name is a folder's: up to 80 letters"
    ),
    "stage from the root": plan(f"{SEARCH}name = '/etc'", "of them a letter or digit, not '/etc'"),
    "stage of a hidden name": plan(f"{SEARCH}name = '.ssh'", "of them a letter or digit, not '.ssh'"),
    "stage of a very long name": plan(
        f"{SEARCH}name = '{'a' * 300}'", "up to 80 letters, digits and any of . _ - + = @"
    ),
    "stage of two lines' name": plan(f'{SEARCH}name = "a\\nb"', "a letter or digit, not 'a\\nb'"),
    "stage of a number's name": plan(f"{SEARCH}name = 3", "stage 1: its name is a text, not 3"),
    "stage named like a baseline": plan(
        f"{SEARCH}name = 'pi'", "Two stages are named 'pi', or it means something else"
    ),
    "two stages of one name": plan(SEARCH + SEARCH, "Two stages are named 'search-256'"),
    "stage of an unknown model": plan(f"{SEARCH}model = 'x'", "is base or a fine-tuning stage before it, not 'x'"),
    "stage of unknown factors": plan(f"{SEARCH}factors = 'x'", "come from a search stage before it, or from none"),
    "recovery of nothing": plan(
        "[[stages]]\nkind = 'recover'\nlength = '1x'", "starts from the factors of a search stage"
    ),
    "search outside": plan(f"{SEARCH}outside = true", "only a fine-tuning can be outside"),
    "two evaluations": plan(SEARCH + EVALUATE + EVALUATE, "evaluates more than once; name all lengths in one stage"),
    # searches
    "stage, seed": plan(f"{SEARCH}seed = 1.5", "seed is a whole number from 0, not 1.5"),
    "stage, infinite seed": plan(f"{SEARCH}seed = inf", "seed is a whole number from 0, not inf"),
    "stage, seed that no store holds": plan(f"{SEARCH}seed = {2**63}", "seed is a whole number from 0, not 92233"),
    "stage, a flag for a seed": plan(f"{SEARCH}seed = true", "seed is a whole number from 0, not True"),
    "stage, a date for a seed": plan(f"{SEARCH}seed = 1979-05-27", "seed is a whole number from 0, not datetime"),
    "stage, infinite n_hat": plan(f"{SEARCH}n_hats = [inf]", "each of n_hats is a whole number from 0, not inf"),
    "stage, negative n_hat": plan(f"{SEARCH}n_hats = [-1]", "each of n_hats is a whole number from 0, not -1"),
    "stage, n_hats in words": plan(f"{SEARCH}n_hats = 'abc'", "n_hats is a list of whole numbers, such as [0, 4, 16]"),
    "stage, no n_hats": plan(f"{SEARCH}n_hats = []", "n_hats is a list of whole numbers"),
    "stage, no finalists": plan(f"{SEARCH}finalists = 0", "finalists is a whole number from 1, not 0"),
    "stage, upper ratio NaN": plan(
        f"{SEARCH}upper_ratio = nan", "stage search-256: The upper bound is a positive number"
    ),
    "stage, upper ratio in words": plan(f"{SEARCH}upper_ratio = 'big'", "upper_ratio is a number, not 'big'"),
    "stage, upper ratio too small": plan(f"{SEARCH}upper_ratio = 0.1", "stage search-256: The bounds of the rescale"),
    "stage, preset": plan(f"{SEARCH}preset = 'huge'", "stage 1: The preset is one of refined, paper"),
    "stage, attention factor": plan(f"{SEARCH}attention_factor = 'big'", "one of su, yarn, none or a positive number"),
    "stage, racing": plan(f"{SEARCH}racing = 1", "racing is true or false, not 1"),
    "stage, critical pair": plan(f"{SEARCH}critical = 99", "search-256: The critical pair is auto (3 for this model)"),
    "stage, critical pair in words": plan(f"{SEARCH}critical = 'first'", "critical is 'auto', or is a whole number"),
    "stage, sampler": plan(f"{SEARCH}sampler = ['tpe']", "The sampler is one of random, random-log, cmaes"),
    "stage, evolution": plan(f"{SEARCH}evolution = 3", "evolution is a table, such as evolution = {{ }}, not 3"),
    "stage, evolution misspelt": plan(
        f"{SEARCH}evolution.generation = 3", "evolution does not know 'generation'; it takes"
    ),
    "stage, half an individual": plan(
        f"{SEARCH}evolution.population = 2.5", "population of evolution is a whole number"
    ),
    "stage, too many individuals": plan(
        f"{SEARCH}evolution.population = {10**12}", "A search of more than 10000000 individ"
    ),
    "stage, refinement in words": plan(
        f"{SEARCH}refinement.steps = 'a'", "steps of refinement is a whole number, not 'a'"
    ),
    "stage, rate NaN": plan(f"{SEARCH}refinement.rate = nan", "The rate of a refinement is a positive number, not nan"),
    "stage, no documents": plan(f"{SEARCH}documents.search = 0", "documents holds a number from 1 by part"),
    "stage, unknown part": plan(f"{SEARCH}windows.train = 1", "windows holds a number from 1 by part"),
    # fine-tunings, evaluations, comparisons
    "tuning without steps": plan(TUNE.replace("steps = 3", ""), "A tuning needs steps"),
    "tuning, no steps": plan(TUNE.replace("= 3", "= 0"), "steps of a tuning is a whole number from 1, not 0"),
    "tuning, warm-up": plan(TUNE.replace("warmup = 0", "warmup = 3"), "warmup of a tuning is in 0 .. 2, not 3"),
    "tuning, rate NaN": plan(f"{TUNE}learning_rate = nan", "learning_rate of a tuning is a number above 0, not nan"),
    "tuning, a rate of 400 digits": plan(f"{TUNE}learning_rate = {'9' * 400}", "is a number above 0, not 999"),
    "tuning, misspelt": plan(f"{TUNE}lr = 1", "stage 1: it does not know 'lr'; it takes tokens, steps, learning_rate"),
    "tuning, optimiser": plan(f"{TUNE}optimizer = 'adam'", "optimizer of a tuning is one of adamw_torch_fused"),
    "tuning, batches": plan(f"{TUNE}batch = 3\nmicro_batch = 2", "The batch must be a multiple of micro_batch"),
    "tuning, shards": plan(f"{TUNE}fsdp.a = 1979-05-27", "fsdp of a tuning is None or a table of plain values"),
    "evaluation without lengths": plan("[[stages]]\nkind = 'evaluate'", "lengths are missing, such as lengths = ['1x'"),
    "evaluation of nested lengths": plan(
        "[[stages]]\nkind = 'evaluate'\nlengths = [[1]]", "A length is a whole number"
    ),
    "evaluation beside no baseline": plan(f"{EVALUATE}baselines = ['x']", "A baseline is one of none, pi, ntk"),
    "evaluation beside a number": plan(
        f"{EVALUATE}baselines = 3", "baselines is a list of names, such as ['pi', 'yarn']"
    ),
    "evaluation of no windows": plan(f"{EVALUATE}windows = 0", "windows of an evaluation is a whole number from 1"),
    "evaluation of trials without end": plan(f"{EVALUATE}passkey_trials = {10**12}", "a whole number from 0 to 10000"),
    "comparison of nothing": plan(f"{COMPARE}methods = ['pi']", "compares the fine-tunings before it with others"),
    "comparison, misspelt": plan(f"{TUNE}{COMPARE}method = ['pi']", "In the plan, stage 2 does not know 'method'"),
    "comparison with a way out": plan(f"{TUNE}{COMPARE}methods = ['../x']", "compares with some of none, pi"),
}

EXTENSIONS = {
    "no such plan": Bad(
        EXTEND.replace("plan.toml", "nowhere"), "There is no plan nowhere: give a TOML file, or one of"
    ),
    "a folder for a plan": Bad(EXTEND.replace("plan.toml", "{text}"), "reference, smoke (Is a directory)"),
    "a device for a plan": Bad(EXTEND.replace("plan.toml", "/dev/zero"), "at most 64 KiB, and 1000 bytes a line"),
    "extend without data": Bad("extend smoke --model {model}", "Name text for your model with --data"),
    "extend without training text": Bad("extend smoke --model {model} --data {text}", "with --train-data"),
    "extend into no folder": Bad(f"{EXTEND} --out nowhere", "--out must be a folder that exists", plan=SEARCH),
    "extend on what is tested": Bad(
        EXTEND.replace("{text}/0.txt", "{text}"), "is in the training text and among the documents", plan=SMALL
    ),
    "extend beyond the text": plan(SEARCH.replace("4x", "64x"), "documents of at least 4096 tokens are needed"),
    "extend under a name in use": Bad(f"{EXTEND} --study done", "There is a study 'done' already", plan=SEARCH),
    "extend under a path": Bad(f"{EXTEND} --study /tmp/x", "A study's name is part of its files' names", plan=SEARCH),
    "extend, negative seed": usage(f"{EXTEND} --seed=-1", "--seed"),
    "extend, no tuning threads": usage(f"{EXTEND} --tuning-threads 0", "--tuning-threads"),
}
