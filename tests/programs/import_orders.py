"""`AutoConfig`, `AutoModel` and `AutoProcessor` know the package's types, in whichever order things are imported.

Usage: import_orders.py ours|theirs|thread
"""

import sys
from importlib import import_module
from threading import Thread

order = sys.argv[1]
if order == "theirs":
    from transformers import AutoConfig, AutoModel, AutoProcessor
samoe_hf = import_module("samoe_hf")
if order != "theirs":
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "gradio"} & sys.modules.keys()
    assert not heavy, heavy
if order == "thread":  # a library that imports transformers for itself
    thread = Thread(target=import_module, args=("transformers.models.auto.configuration_auto",))
    thread.start()
    thread.join()
if order != "theirs":
    from transformers import CONFIG_MAPPING

    assert "samoe" in CONFIG_MAPPING and "samoe_hf.model" not in sys.modules
    from transformers import AutoConfig, AutoModel, AutoProcessor
folder = samoe_hf.small_base()
assert type(AutoConfig.from_pretrained(folder)) is samoe_hf.SamoeConfig
assert type(AutoModel.from_pretrained(folder)) is samoe_hf.SamoeModel
assert type(AutoProcessor.from_pretrained(folder)).__name__ == "Sam2VideoProcessor"
