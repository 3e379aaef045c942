#!/bin/sh
# From a finished run to every place where its adapter can run, each held to the run itself by `deltaw verify`.
#   recipes/ship.sh [RUN [FOLDER [BASE.gguf]]]      runs/demo, shipped, builtin:smollm2-135m without them
# What it prints for the demo stands in docs/shipping.md. A place whose program isn't installed is left out, and said.
set -eu
run=${1:-runs/demo} to=${2:-shipped} base=${3:-builtin:smollm2-135m}

python=$(dirname "$(command -v deltaw)")/python

deltaw() {
    printf '\n$ deltaw %s\n' "$*"
    command deltaw "$@"
}

has() {
    "$python" -c "import $1" 2>/dev/null && return
    printf '\nleft out: %s is not installed\n' "$1"
    return 1
}

deltaw lint "$run"

# PEFT, and vLLM, which reads PEFT's folder
deltaw export "$run" --to peft -o "$to/peft"
deltaw export "$run" --to vllm --plain -o "$to/vllm"
if has peft; then
    deltaw verify "$run" "peft:$to/peft"
    deltaw verify "$run" "peft:$to/vllm"
fi

# One model, for transformers and whatever reads its folders
deltaw merge "$run" -o "$to/merged"
deltaw verify "$run" "$to/merged"

# llama.cpp and Ollama: the adapter on the base's own GGUF, and the whole model as one
deltaw export "$run" --to gguf -o "$to/gguf"
deltaw export "$run" --to gguf --merged --type BF16 -o "$to/gguf-bf16"
deltaw export "$run" --to gguf --merged --type Q8_0 -o "$to/gguf-q8_0"
if has xllamacpp; then
    deltaw verify "$run" "$base+$to/gguf/adapter.gguf"
    deltaw verify "$run" "$to"/gguf-bf16/*.gguf
    deltaw verify "$run" "$to"/gguf-q8_0/*.gguf
fi

# MLX
deltaw export "$run" --to mlx -o "$to/mlx"
if has mlx_lm; then
    deltaw verify "$run" "mlx:$to/mlx"
fi
