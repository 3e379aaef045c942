from pathlib import Path
from deltaw.base.gguf_header import Header
def set_pre_tokenizer(folder: Path, header: Header) -> None:
    pass
