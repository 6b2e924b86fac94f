"""Questions and answers, as a trainer gets them: forget rows, each with a retain row drawn at random."""

import torch
from torch.nn.utils.rnn import pad_sequence


class Rows(torch.utils.data.Dataset):
    """Encoded pairs, without padding; the prompt carries no labels and eos is trained."""

    def __init__(self, tokenizer, pairs):
        self.items = []
        for question, answer in pairs:
            chat = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            prompt += tokenizer("Answer:")["input_ids"]  # after a line's end the tests' random model is silent
            ids = prompt + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            self.items.append(
                {
                    "input_ids": torch.tensor(ids),
                    "labels": torch.tensor(labels),
                    "attention_mask": torch.ones(len(ids)),
                }
            )

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class ForgetRetain(torch.utils.data.Dataset):
    def __init__(self, forget, retain):
        self.forget, self.retain = forget, retain

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, i):
        return {"forget": self.forget[i], "retain": self.retain[int(torch.randint(len(self.retain), (1,)))]}


class Collator:
    """Pads on the right; the mask is what differs from the pad token."""

    def __init__(self, tokenizer):
        self.pad = tokenizer.pad_token_id

    def __call__(self, items):
        if "input_ids" not in items[0]:
            return {name: self([item[name] for item in items]) for name in items[0]}
        ids = pad_sequence([item["input_ids"] for item in items], batch_first=True, padding_value=self.pad)
        labels = pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=-100)
        return {"input_ids": ids, "attention_mask": ids != self.pad, "labels": labels}
