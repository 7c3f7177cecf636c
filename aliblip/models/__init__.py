"""Where models come from and go to: BLIP's files, trained towers, the model card, the Hub."""
