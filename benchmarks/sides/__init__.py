"""The engines that are compared: jaxserve and its peers, each in a process of its own, spoken to in lines of JSON.

A line {"prompts": [...], "new_tokens": [...], "ignore_eos": true} is answered by one that begins with {"side": "done"
and holds `seconds`, `output_tokens` and what else the side knows; {"side": "ready", "versions": {...}} comes first.
"""
