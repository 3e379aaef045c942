"""What other tools call it: a verb that somebody types here because it has that name elsewhere -> what does it here.

One line each, printed below "no such verb". A test holds every command line in it to the verbs and options that exist.
"""

_TRAIN = "a run file is trained: deltaw train run.yaml    (deltaw demo shows one; README has a run file to copy)"
_ASK = "ask a model: deltaw generate RUN 'a prompt', or deltaw chat RUN"
_SERVE = "for other programs: deltaw serve RUN; for vLLM: deltaw export RUN --to vllm -o FOLDER"
_GGUF = "for llama.cpp and Ollama: deltaw export RUN --to gguf -o FOLDER (--merged --type Q8_0: the whole model)"
_MEASURE = "measure a model: deltaw eval RUN"
_LOOK = "look at an adapter: deltaw inspect RUN; at all runs: deltaw runs"
_MERGE = "merge an adapter into its base: deltaw merge RUN -o FOLDER"
_SEVERAL = "several processes: torchrun --nproc-per-node N -m deltaw train run.yaml"
_MACHINE = "what this machine has and what follows: deltaw doctor"

ELSEWHERE = {
    **dict.fromkeys(("finetune", "fine-tune", "sft", "lora", "fit", "start", "launch"), _TRAIN),
    **dict.fromkeys(("resume", "continue"), "a run folder is resumed: deltaw train RUN"),
    **dict.fromkeys(
        ("dpo", "orpo", "kto", "grpo", "rlhf", "reward"),
        "deltaw trains on examples; preferences and rewards aren't supported",
    ),
    **dict.fromkeys(("run", "infer", "inference", "predict", "complete", "ask", "prompt", "test"), _ASK),
    **dict.fromkeys(("server", "deploy", "host", "api"), _SERVE),
    **dict.fromkeys(("gguf", "convert", "ollama", "save"), _GGUF),
    **dict.fromkeys(
        ("quantize", "quantise", "quant"),
        "a base is quantised as it is loaded (base_weights: nf4 in the run file); to quantise the result: "
        "deltaw export RUN --to gguf --merged --type Q8_0 -o FOLDER",
    ),
    **dict.fromkeys(("fuse", "merge-lora", "merge-and-unload", "bake"), _MERGE),
    **dict.fromkeys(
        ("push", "upload", "publish"),
        "export pushes to the hub: deltaw export RUN --to peft -o FOLDER --push me/name    (private by default)",
    ),
    **dict.fromkeys(("pull", "download", "fetch"), "a base is downloaded when a run file names its hub id"),
    **dict.fromkeys(("login", "auth"), "the hub's own tool does that: hf auth login"),
    **dict.fromkeys(("evaluate", "benchmark", "bench", "perplexity", "score"), _MEASURE),
    **dict.fromkeys(("list", "ls", "info", "show", "report", "status", "analyze", "analyse"), _LOOK),
    **dict.fromkeys(
        ("preprocess", "tokenize", "dataset", "data"), "see what would be trained: deltaw preview run.yaml"
    ),
    **dict.fromkeys(("estimate", "dry-run", "memory"), "measure a run before it starts: deltaw plan run.yaml"),
    **dict.fromkeys(("env", "check", "system", "setup", "version-info"), _MACHINE),
    **dict.fromkeys(
        ("prune", "truncate", "compress", "svd"), "make an adapter smaller: deltaw resize RUN --rank 4 -o FOLDER"
    ),
    **dict.fromkeys(("mix", "average", "add", "blend"), "combine adapters: deltaw combine RUN OTHER -o FOLDER"),
    **dict.fromkeys(("init", "new", "config", "create"), _TRAIN),
    **dict.fromkeys(("torchrun", "accelerate", "ddp", "fsdp", "deepspeed", "distributed"), _SEVERAL),
    "help": "deltaw --help lists the verbs; deltaw train --help explains one",
    "version": "the version: deltaw --version",
}
