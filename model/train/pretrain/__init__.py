"""Starting points for a small model made from nothing: tokenizer, CLIP and SAM towers, language model, on phantoms."""
