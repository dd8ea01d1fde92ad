"""Inputs made from nothing: page images with rows, small processors, small models.

For the demo, and for tests where no real data are at hand. Nothing is downloaded and nothing is random but by
a seed. What is made has the real shapes: real image files with their real oddities, folders that transformers
loads, real model classes; only the sizes are small.

- `pages.write_pages`: page images, `pages.jsonl`, `chat.jsonl`, `eval.jsonl`, bad rows on purpose.
- `processors.write_processor`: a tokenizer trained on such texts, image-processor settings, chat template.
- `models.small_config`: a model config of a few layers that fits such a processor.
"""
