"""Generated inputs: page images with rows, small processors, small models.

They are for the demo, and for tests where no real data are at hand. Nothing is downloaded, and randomness comes from a
seed alone. The outputs have real forms: image files with their real oddities, folders that transformers loads, real
model classes; only the sizes are small.

- `pages.write_pages`: page images, `pages.jsonl`, `chat.jsonl`, `eval.jsonl`, bad rows on purpose.
- `processors.write_processor`: a tokenizer trained on such texts, image-processor settings, chat template.
- `models.small_config`: a model config of a few layers that fits such a processor.
- `numbers.write_numbers`, `numbers.write_reader`: pictures of numbers, and a model that soon reads them.
"""
