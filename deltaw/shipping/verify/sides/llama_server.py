"""llama.cpp's server in a process of its own: run as a script, told what to load by one line of JSON on stdin.

It answers with one line on stdout, its address, and ends when stdin does: with the process that started it, however
that ends. A process of its own, because llama.cpp aborts on what it doesn't like (an assertion, a file that is not what
it says), and an abort takes the whole process with it. The home of xllamacpp.
"""

import json
import os
import sys


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    import xllamacpp  # type: ignore[import-untyped, import-not-found, unused-ignore]

    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in asked["adapters"]]
    params.n_parallel = 1
    params.n_ctx = asked["context"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
    params.port, params.api_keys = 0, [asked["key"]]
    params.warmup, params.ui = False, False
    # As F16 (the default) keys and values alone move log-probabilities by 0.01: it's the file that is asked about.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = 1  # errors
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # without waiting for a request that nobody reads any more


if __name__ == "__main__":
    main()
