"""From a sample's number to a normalised tensor on the device."""
