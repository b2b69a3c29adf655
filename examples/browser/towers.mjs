// Both towers of a folder that `mmkd export --format onnx` has written, by transformers.js, in a browser or in Node.

/**
 * Load tokenizer, processor and towers.
 * @param library the module `@huggingface/transformers`
 * @param folder Hub id, or folder below `library.env.localModelPath`
 * @param options of the towers: `dtype` ("fp32", "fp16" or "q8") and `device` ("wasm", "webgpu", in Node "cpu")
 */
export async function loadTowers(library, folder, options = {}) {
  const [config, tokenizer, processor, vision, text] = await Promise.all([
    library.AutoConfig.from_pretrained(folder),
    library.AutoTokenizer.from_pretrained(folder),
    library.AutoProcessor.from_pretrained(folder),
    library.CLIPVisionModelWithProjection.from_pretrained(folder, options),
    library.CLIPTextModelWithProjection.from_pretrained(folder, options),
  ]);
  const scale = Math.exp(config.logit_scale_init_value);

  /** Unit vector of an image, given as an address, a file or a path. */
  async function encodeImage(image) {
    const inputs = await processor(await library.RawImage.read(image));
    return (await vision(inputs)).image_embeds.tolist()[0];
  }

  /** Unit vectors of texts. */
  async function encodeTexts(texts) {
    return (await text(tokenizer(texts, { padding: true, truncation: true }))).text_embeds.tolist();
  }

  /** Share of each label, of a softmax over the labels given. */
  async function classify(image, labels) {
    const [vector, vectors] = [await encodeImage(image), await encodeTexts(labels)];
    return library.softmax(vectors.map((other) => scale * other.reduce((sum, value, k) => sum + value * vector[k], 0)));
  }

  return { encodeImage, encodeTexts, classify };
}
